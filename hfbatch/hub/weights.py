"""Finds and checks the safetensors files of a model. Reads only their headers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hfbatch.hub.jsonfiles import is_pointer, pointer_fault, read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def weight_files(folder: Path) -> list[str]:
    """Returns the names of the safetensors files that transformers loads from a folder, missing ones included."""
    explicit = _config(folder).get("transformers_weights")
    name = explicit if isinstance(explicit, str) else WEIGHTS
    if name.endswith(".safetensors") and (name != WEIGHTS or (folder / name).is_file()):
        return [name]
    return sorted(set(_weight_map(folder, INDEX if name == WEIGHTS else name).values()))


def shapes_of(path: Path) -> Iterator[tuple[str, list[int]]]:
    """Yields names and shapes of a safetensors file's tensors. :raises safetensors.SafetensorError: for other files."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            yield name, weights.get_slice(name).get_shape()


def index_faults(model: str, folder: Path, there: Collection[str]) -> list[str]:
    """Checks the names of the files that hold the weights; returns the faults.

    :param model: name of the model, for errors.
    :param folder: folder of its JSON files.
    :param there: names of the model's files, on this machine or on the Hub.
    """
    explicit = _config(folder).get("transformers_weights")
    if explicit is not None and (
        not isinstance(explicit, str) or not _is_plain(explicit, ".safetensors.index.json")
    ):
        return [
            f"model {model!r}: config.json has transformers_weights {explicit!r}; only the name of a .safetensors file, "
            "or of its index, in the same folder can be read"
        ]
    index = explicit if explicit and explicit.endswith(".json") else INDEX
    if not explicit and (WEIGHTS in there or INDEX not in there):
        return []
    if explicit and explicit.endswith(".safetensors"):
        missing = "" if explicit in there else f"; {explicit} is missing: download the model again"
        return [f"model {model!r}: config.json names {explicit} as its weights{missing}"] if missing else []
    names = _weight_map(folder, index)
    if not names:
        return [
            f'model {model!r}: {index} has no "weight_map" of tensors to .safetensors files; download it again'
        ]
    shards = {str(name) for name in names.values()}
    foreign = sorted(name for name in shards if not _is_plain(name))
    if foreign:
        return [
            f"model {model!r}: {index} names {foreign[0]!r}, which is not a .safetensors file in the same folder; such a file "
            "is not read: put the weights beside the index, or save the model again with save_pretrained"
        ]
    faults = [
        f"model {model!r}: {index} names {name}, which is missing; download the model again, or save it again with "
        "save_pretrained"
        for name in sorted(shards - set(there))
    ]
    kinds = {match.groups() for name in shards if (match := _SHARD.fullmatch(name))}
    left_out = sorted(
        name for name in set(there) - shards if (match := _SHARD.fullmatch(name)) and match.groups() in kinds
    )
    faults += [
        f"model {model!r}: {index} does not name {name}, which lies beside it, so that its tensors would not be loaded; "
        "download the index again"
        for name in left_out
    ]
    return faults


def header_faults(model: str, folder: Path) -> list[str]:
    """Checks the headers of the weights: invalid or truncated files, and missing tensors; returns the faults.

    :param model: name of the model, for errors.
    """
    from safetensors import SafetensorError

    faults, held = [], {}
    modules = sorted(str(path.relative_to(folder)) for path in folder.glob("[0-9]*_*/" + WEIGHTS))
    for name in (*weight_files(folder), *modules):
        path = folder / name
        if is_pointer(path):
            faults.append(pointer_fault(model, name))
            continue
        try:
            held[name] = {tensor for tensor, _ in shapes_of(path)}
        except (SafetensorError, OSError, ValueError) as error:
            faults.append(
                f"model {model!r}: {name} ({path.stat().st_size:,} bytes) is not a complete safetensors file ({error}); it is "
                "truncated or damaged: download it again"
            )
    if (folder / WEIGHTS).is_file():
        return faults
    lacking: dict[str, list[str]] = {}
    for tensor, name in _weight_map(folder, INDEX).items():
        if name in held and tensor not in held[name]:
            lacking.setdefault(name, []).append(tensor)
    return faults + [
        f"model {model!r}: {name} lacks {len(tensors)} tensors that {INDEX} says it holds, such as {tensors[0]!r}; the two "
        "are of different versions: download the model again"
        for name, tensors in sorted(lacking.items())
    ]


def _is_plain(name: str, *ends: str) -> bool:
    """Returns whether a name is that of a safetensors file in the folder itself, not a path that may lead out of it."""
    return Path(name).name == name and name.endswith((".safetensors", *ends)) and "\\" not in name


def _weight_map(folder: Path, index: str) -> Mapping[str, str]:
    found = (read_object(folder / index) or {}).get("weight_map")
    return found if isinstance(found, dict) and all(isinstance(one, str) for one in found.values()) else {}


def _config(folder: Path) -> dict[str, Any]:
    return read_object(folder / "config.json") or {}
