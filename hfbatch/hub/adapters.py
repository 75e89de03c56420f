"""Reads and checks the files of a PEFT adapter, which stands beside its base model. Loads no weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hfbatch.hub.jsonfiles import is_pointer, pointer_fault, read_object
from hfbatch.hub.modelfiles import ADAPTER_CONFIG, file_faults
from hfbatch.hub.weights import shapes_of
from hfbatch.spec.job import ModelSpec

WEIGHTS = "adapter_model.safetensors"


def is_adapter(names: Collection[str]) -> bool:
    """Whether a folder holds an adapter and no model. :param names: names of its files."""
    return ADAPTER_CONFIG in names and "config.json" not in names


def adapter_faults(model: str, folder: Path, names: Collection[str]) -> list[str]:
    """Checks the files of an adapter; returns their faults.

    :param model: name of the adapter, for errors.
    :param names: names of the files in the folder.
    """
    if faults := file_faults(model, folder, names):
        return faults
    faults, base = [], (read_object(folder / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        faults.append(
            f"model {model!r}: {ADAPTER_CONFIG} has base_model_name_or_path {base!r}; write the name or folder of the model "
            "there that the adapter was trained on"
        )
    if WEIGHTS not in names:
        other = next((name for name in ("adapter_model.bin", "adapter_model.pt") if name in names), None)
        faults.append(
            f"model {model!r} has the weights of its adapter in a pickle file ({other}), which can run code when opened; convert it "
            "once: PeftModel.from_pretrained(base, adapter).save_pretrained(folder) writes safetensors"
            if other
            else f"model {model!r} is an adapter without weights; expected {WEIGHTS} beside {ADAPTER_CONFIG}"
        )
    elif is_pointer(folder / WEIGHTS):
        faults.append(pointer_fault(model, WEIGHTS))
    else:
        faults += _header_faults(model, folder / WEIGHTS)
    return faults


def _header_faults(model: str, path: Path) -> list[str]:
    from safetensors import SafetensorError

    try:
        list(shapes_of(path))
    except (OSError, SafetensorError) as error:
        return [
            f"model {model!r}: {path.name} cannot be read ({error}); if it is incomplete, download it again"
        ]
    return []


def base_of(folder: Path, trust_remote_code: bool) -> ModelSpec:
    """The model that an adapter without faults belongs to, at the commit that it was trained on if it states one."""
    config = read_object(folder / ADAPTER_CONFIG) or {}
    name, revision = str(config["base_model_name_or_path"]), config.get("revision")
    pinned = isinstance(revision, str) and not Path(name).expanduser().is_dir()
    return ModelSpec.model_validate(
        {"name": name, "revision": revision if pinned else None, "trust_remote_code": trust_remote_code}
    )
