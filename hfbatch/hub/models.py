"""Pins model names to commits, downloads model files and checks them. Loads no weights."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from hfbatch.errors import SpecError
from hfbatch.hub import adapters as peft_files
from hfbatch.hub import weights as safetensors_files
from hfbatch.hub.gguf import ENDING, gguf_faults, unnamed_fault
from hfbatch.hub.graphs import files_of, graph_alone_fault, graph_faults, graph_patterns, own_graphs
from hfbatch.hub.jsonfiles import read_json
from hfbatch.hub.modelfiles import TOKENIZER_CONFIG, file_faults, layout_faults
from hfbatch.spec.job import ModelSpec

PICKLES = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.gguf",
    "*.onnx",
    "*.mlmodel",
)
"""Not downloaded: weights in formats that run code when opened, or that no engine reads; of GGUF files, the one in the spec is."""
GRAPH_FILES = ("*.onnx[._]data*", "*openvino_model*.xml")
"""Not downloaded either, beside safetensors weights: the other files of graphs."""
WHOLE_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Model:
    """A model at one commit."""

    name: str
    folder: str
    """Local folder of the files; for a Hub model, a snapshot in the Hub cache; empty for a model that an endpoint serves."""
    commit: str
    """The Hub commit, or a digest of the folder's files."""
    trust_remote_code: bool = False
    hub: bool = False
    file: str = ""
    """Name of the GGUF file that holds the model, if one does."""
    source: str = ""
    """Local folder of that file; `folder` is where the engines have written what it holds (engines/gguf.py)."""
    graphs: dict[str, str] = field(default_factory=dict, hash=False)
    """The graphs that hold the model, if no safetensors weights do: engine to file."""
    adapter: str = ""
    """Local folder of the adapter that the name means; `folder` is that of its base model, and `commit` a digest of both."""
    base: str = ""
    """Name of an adapter's base model, if that is a Hub model."""
    base_commit: str = ""

    @property
    def tokenizer_folder(self) -> str:
        """Local folder of the tokenizer: an adapter may have its own."""
        own = self.adapter and (Path(self.adapter) / TOKENIZER_CONFIG).is_file()
        return self.adapter if own else self.folder

    @property
    def version(self) -> str:
        """What determines the content: the commit, and the GGUF file or the graph in a repository that may have weights too."""
        part = self.file or ("graph" if self.graphs else "")
        return f"{self.commit}/{part}" if self.hub and part else self.commit

    def fetch(self) -> Model:
        """Returns the same model with all its files on this machine; downloads a Hub model once per node."""
        if not self.hub:
            return self
        from huggingface_hub import snapshot_download

        if self.file:
            source = snapshot_download(self.name, revision=self.commit, allow_patterns=[self.file])
            return replace(self, source=source)
        ignored = [*PICKLES, *GRAPH_FILES]
        name, commit = (self.base, self.base_commit) if self.base else (self.name, self.commit)
        folder = snapshot_download(name, revision=commit, ignore_patterns=ignored)
        if self.graphs:
            snapshot_download(self.name, revision=self.commit, allow_patterns=graph_patterns(self.graphs))
        return replace(self, folder=folder)

    def read_json(self, filename: str) -> Any:
        """Reads a JSON file of the model; returns None if there is none."""
        path = Path(self.folder) / filename
        return read_json(path) if self.folder and path.is_file() else None

    def pipeline_tag(self) -> str | None:
        """Returns the task named in the model card, if any."""
        from huggingface_hub import metadata_load

        card = Path(self.folder) / "README.md"
        try:
            tag = (metadata_load(card) or {}).get("pipeline_tag") if card.is_file() else None
        except (ValueError, yaml.YAMLError):  # written by hand
            return None
        return tag if isinstance(tag, str) else None

    def size(self) -> tuple[int, int]:
        """Returns parameters and bytes of the weights, from the safetensors headers; (0, 0) if not downloaded.

        The parameters of a graph are not counted.
        """
        if not self.folder:
            return 0, 0
        folder = Path(self.folder)
        if self.graphs:
            return 0, sum((folder / name).stat().st_size for name in files_of(self.graphs, files_in(folder)))
        paths = [
            folder / name for name in safetensors_files.weight_files(folder) if (folder / name).is_file()
        ]
        shapes = [shape for path in paths for _, shape in safetensors_files.shapes_of(path)]
        return sum(map(math.prod, shapes)), sum(path.stat().st_size for path in paths)


def pin(spec: ModelSpec, weights: bool = True, graphs: bool = False, adapters: bool = False) -> Model:
    """Finds the model and fixes its commit.

    :param weights: whether weights are required.
    :param graphs: whether a graph will do in their place.
    :param adapters: whether the folder of an adapter will do, with its base model.

    :raises SpecError: no such folder or Hub model, no config, no weights, or weights in pickle files only.
    """
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        return _pin_folder(spec, folder.resolve(), weights, graphs, adapters)
    if folder.is_file() and folder.suffix == ENDING:
        raise SpecError(
            f"model.name {spec.name!r} is a file; give model.name={str(folder.parent)!r} and model.file={folder.name!r}"
        )
    if spec.name.startswith(("/", ".", "~")) or spec.name.count("/") > 1:
        raise SpecError(
            f"model.name: no folder {spec.name!r}; give a folder with config.json, or a Hub name org/model"
        )
    return _pin_hub(spec, weights, graphs, adapters)


def _pin_folder(spec: ModelSpec, folder: Path, weights: bool, graphs: bool, adapters: bool) -> Model:
    if spec.revision:
        raise SpecError(
            f"model.revision {spec.revision!r} is for Hub models; {spec.name!r} is a folder: leave it out"
        )
    names = files_in(folder)
    if spec.file:
        return _pin_file(spec, folder, names)
    if adapters and peft_files.is_adapter(names):
        return _pin_adapter(spec, folder, names)
    own = own_graphs(names) if graphs else {}
    faults = weight_faults(spec.name, names, weights, folder, own)
    if not faults:
        faults = file_faults(spec.name, folder, names, spec.trust_remote_code)
    if weights and not faults:
        faults = safetensors_files.index_faults(spec.name, folder, names)
        faults = faults or safetensors_files.header_faults(spec.name, folder)
    if faults:
        raise SpecError(faults)
    commit = _folder_digest(folder, names, whole=bool(own))
    return Model(spec.name, str(folder), commit, spec.trust_remote_code, graphs=own)


def _pin_adapter(spec: ModelSpec, folder: Path, names: list[str]) -> Model:
    """Checks an adapter, and finds its base model."""
    if faults := peft_files.adapter_faults(spec.name, folder, names):
        raise SpecError(faults)
    given = peft_files.base_of(folder, spec.trust_remote_code)
    try:
        base = pin(given)
    except SpecError as error:
        raise SpecError(
            [
                f"model {spec.name!r} is an adapter of {given.name!r} (base_model_name_or_path in adapter_config.json): {fault}"
                for fault in error.faults
            ]
        ) from error
    both = _folder_digest(folder, names) + base.version
    return replace(
        base,
        name=spec.name,
        commit=hashlib.blake2b(both.encode(), digest_size=20).hexdigest(),
        adapter=str(folder),
        base=base.name if base.hub else "",
        base_commit=base.commit,
    )


def _pin_file(spec: ModelSpec, folder: Path, names: Collection[str], commit: str = "") -> Model:
    """Checks a GGUF file. :param commit: of a Hub model; without one, the file is digested."""
    file = str(spec.file)
    faults = gguf_faults(spec.name, file, names, folder)
    if faults:
        raise SpecError(faults)
    digest = hashlib.blake2b(digest_size=20)
    if not commit:
        _digest_file(folder / file, digest)
    return Model(
        spec.name, str(folder), commit or digest.hexdigest(), hub=bool(commit), file=file, source=str(folder)
    )


def _pin_hub(spec: ModelSpec, weights: bool, graphs: bool, adapters: bool) -> Model:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    where = f"model.name {spec.name!r}" + (f" at revision {spec.revision!r}" if spec.revision else "")
    patterns = [*PICKLES, *GRAPH_FILES, "*.safetensors"]
    try:
        info = HfApi().model_info(spec.name, revision=spec.revision)
        names = [file.rfilename for file in info.siblings or []]
        if spec.file:
            if faults := gguf_faults(spec.name, spec.file, names):
                raise SpecError(faults)
            folder = snapshot_download(spec.name, revision=info.sha, allow_patterns=[spec.file])
            return _pin_file(spec, Path(folder), names, str(info.sha))
        if adapters and peft_files.is_adapter(names):
            raise SpecError(
                f"{where}: an adapter on the Hub, and adapters are read from folders; run `hf download {spec.name} --local-dir "
                "FOLDER` on every node, and give that folder"
            )
        own = own_graphs(names) if graphs else {}
        faults = weight_faults(spec.name, names, weights, graphs=own)
        if faults:
            raise SpecError(faults)
        folder = snapshot_download(spec.name, revision=info.sha, ignore_patterns=patterns)
        _check_snapshot(spec, Path(folder), names if weights else None, own)
    except RevisionNotFoundError as error:
        raise SpecError(f"{where}: no such revision; leave model.revision out for the newest") from error
    except RepositoryNotFoundError as error:
        raise SpecError(
            f"{where}: no such model on the Hub, or it is gated; set HF_TOKEN, or give a folder"
        ) from error
    except SpecError:
        raise
    except Exception as error:  # noqa: BLE001 - the HTTP client raises its own errors if the Hub is unreachable
        return _pin_cached(spec, where, error, graphs)
    return Model(spec.name, folder, str(info.sha), spec.trust_remote_code, hub=True, graphs=own)


def _pin_cached(spec: ModelSpec, where: str, cause: Exception, graphs: bool) -> Model:
    """Uses a snapshot in the cache if the Hub does not answer: the name of its folder is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(spec.name, revision=spec.revision, local_files_only=True)
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SpecError(
            f"{where}: no such folder here, not in the cache, and the Hub cannot be reached "
            f"({type(cause).__name__}); give a folder"
        ) from error
    names, commit = files_in(Path(folder)), Path(folder).name
    if spec.file:
        return _pin_file(spec, Path(folder), names, commit)
    own = own_graphs(names) if graphs else {}
    _check_snapshot(spec, Path(folder), graphs=own)
    return Model(spec.name, folder, commit, spec.trust_remote_code, hub=True, graphs=own)


def _check_snapshot(
    spec: ModelSpec, folder: Path, names: list[str] | None = None, graphs: Mapping[str, str] | None = None
) -> None:
    """Checks the downloaded files of a Hub model other than its weights.

    :param names: names of all its files on the Hub, to check for weights too.
    :param graphs: its graphs, if they take the place of weights.
    :raises SpecError: if there are faults.
    """
    here = files_in(folder)
    faults = weight_faults(spec.name, here if names is None else names, names is not None, folder, graphs)
    faults = faults or file_faults(spec.name, folder, here, spec.trust_remote_code)
    if names is not None:
        faults = faults or safetensors_files.index_faults(spec.name, folder, names)
    if faults:
        raise SpecError(faults)


def files_in(folder: Path) -> list[str]:
    """Returns the sorted names of all files below a folder; follows links, except those to a parent folder."""
    names, seen = [], {str(parent) for parent in folder.resolve().parents}
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        paths = (Path(where) / file for file in files)
        names += [str(path.relative_to(folder)) for path in paths if path.is_file()]
    return sorted(names)


def weight_faults(
    name: str,
    files: list[str],
    weights: bool = True,
    folder: Path | None = None,
    graphs: Mapping[str, str] | None = None,
) -> list[str]:
    """Checks that a model's files include weights that can be loaded; returns the faults.

    :param weights: whether weights are required.
    :param folder: folder of its JSON files, if they are on this machine.
    :param graphs: its graphs, if they take the place of weights.
    """
    if graphs:
        return layout_faults(name, files, folder) or graph_faults(name, graphs, files, folder)
    top = [file for file in files if "/" not in file]
    if not any(file.endswith(".safetensors") for file in top) and (fault := unnamed_fault(name, files)):
        return [fault]
    faults = layout_faults(name, files, folder)
    if faults or not weights:
        return faults
    if safetensors_files.WEIGHTS in top or safetensors_files.INDEX in top:
        return []
    if folder and safetensors_files.weight_files(folder):  # named in config.json
        return []
    others = [file for file in top if file.endswith(".safetensors")]
    if others and not folder:
        return []
    if others:
        return [
            f"model {name!r} has its weights in {others[0]}, which transformers does not look for; expected "
            "model.safetensors beside config.json: rename that file, or save the model with save_pretrained"
        ]
    if found := own_graphs(files):
        return [f"{graph_alone_fault(name, found)}; here weights are needed"]
    pickles = [file for file in top if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return [
            f"model {name!r} has its weights only in pickle files ({pickles[0]}), which can run code when opened; "
            "convert it once: AutoModel.from_pretrained(...).save_pretrained(folder) writes safetensors"
        ]
    return [f"model {name!r} has no weights; expected model.safetensors beside config.json"]


def _folder_digest(folder: Path, names: list[str], whole: bool = False) -> str:
    """Digests the files of a model. :param whole: those that are not read beside safetensors weights too."""
    digest = hashlib.blake2b(digest_size=20)
    left_out = ("*.md",) if whole else ("*.md", *PICKLES)
    for name in names:
        if not any(Path(name).match(pattern) for pattern in left_out):
            digest.update(os.fsencode(name) + b"\0")
            _digest_file(folder / name, digest)
    return digest.hexdigest()


def _digest_file(path: Path, digest: Any) -> None:
    """Digests files up to 64 MiB whole; of larger ones the size and 64 evenly spaced MiB, which training changes."""
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            digest.update(file.read())
            return
        for k in range(64):
            file.seek((size - (1 << 20)) * k // 63)
            digest.update(file.read(1 << 20))
