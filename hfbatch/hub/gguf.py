"""Finds and checks the GGUF files of a model. Reads only their headers."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from hfbatch.hub.gguf_header import check_header
from hfbatch.hub.jsonfiles import is_pointer, pointer_fault
from hfbatch.hub.modelfiles import is_inside

ENDING = ".gguf"
_SHARD = re.compile(r".+-\d{5}-of-(\d{5})\.gguf")


def gguf_files(names: Collection[str]) -> list[str]:
    """Returns the names of the GGUF files among a model's files."""
    return sorted(name for name in names if name.lower().endswith(ENDING))


def gguf_faults(model: str, file: str, names: Collection[str], folder: Path | None = None) -> list[str]:
    """Checks the file that `model.file` names; returns its faults.

    :param model: name of the model, for errors.
    :param names: names of the model's files.
    :param folder: where they are, if they are on this machine.
    """
    there = gguf_files(names)
    if not is_inside(file) or file not in there:
        has = f"it has: {', '.join(there)}" if there else "it has no GGUF files: leave model.file out"
        return [f"model.file: model {model!r} has no GGUF file {file!r}; {has}"]
    shard = _SHARD.fullmatch(file)
    if shard and int(shard[1]) > 1:
        return [
            f"model.file {file!r} is one of {int(shard[1])} files of a model, which transformers does not read; join them: "
            "`llama-gguf-split --merge FIRST OUT` of llama.cpp, and give the result"
        ]
    if folder is None:
        return []
    path = folder / file
    if is_pointer(path):
        return [pointer_fault(model, file)]
    try:
        check_header(path)
    except ValueError as error:
        return [f"model.file: {file} cannot be read: {error}; if it is incomplete, download it again"]
    return []


def unnamed_fault(model: str, names: Collection[str]) -> str | None:
    """Returns the fault of a model that has GGUF files alone, of which the spec names none."""
    there = gguf_files(names)
    if not there:
        return None
    return (
        f"model {model!r} has its weights in GGUF files; name one of them: model.file: {' or '.join(there)} "
        f"(--set model.file={there[0]})"
    )
