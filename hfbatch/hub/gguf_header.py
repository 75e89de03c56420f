"""Reads the header of a GGUF file, and refuses one that claims more than the file can hold.

The package gguf loops over as many values as a header claims, and transformers builds as many layers.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""The formats of numbers, by their code; 7 is a boolean."""
STRING, ARRAY = 8, 9
MOST_NESTED = 4
MOST_DIMENSIONS = 8
WEIGHTS_PER_BYTE = 8
"""Every quantisation takes more than a bit for each weight."""
MOST_CONTEXT = 1 << 31
MOST_ENTRIES = 1 << 21
"""Keys, tensors, and values of an array; vocabularies have some 300,000."""


def check_header(path: Path) -> None:
    """Checks what a GGUF file claims against its size. :raises ValueError: for what is not a header that the file can have."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it is not a GGUF file")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            _check(_Reader(data))


def _check(reader: _Reader) -> None:
    (version,) = reader.numbers("I", 1)
    if not version & 0xFFFF:  # written on a machine of the other byte order
        reader.order = ">"
        (version,) = struct.unpack(">I", struct.pack("<I", version))
    if version not in VERSIONS:
        raise ValueError(f"it is of version {version} of the format, and transformers reads 2 and 3")
    tensors, entries = reader.numbers("Q", 2)
    reader.check_room(tensors, 25, "tensors")  # length of the name, dimensions, type and offset
    reader.check_room(entries, 13, "keys")  # length of the name, type and value
    values = {}
    for _ in range(entries):
        name = reader.text()
        values[name] = reader.value(reader.numbers("I", 1)[0])
    widest = 0
    for _ in range(tensors):
        name = reader.text()
        (count,) = reader.numbers("I", 1)
        shape = reader.numbers("Q", count) if count <= MOST_DIMENSIONS else ()
        if count > MOST_DIMENSIONS or math.prod(shape) > WEIGHTS_PER_BYTE * len(reader.data):
            raise ValueError(
                f"its header has a tensor {name} of {count} dimensions {shape}, for which it is too small"
            )
        reader.numbers("I", 1), reader.numbers("Q", 1)
        widest = max(widest, *shape, 0)
    _check_sizes(values, tensors, widest)


def _check_sizes(values: dict[str, Any], tensors: int, widest: int) -> None:
    """Checks the sizes of the model: a layer has a tensor or more, and each width is a dimension of one, or less."""
    kind = f"{values.get('general.architecture')}."
    for name, value in values.items():
        if not name.startswith(kind) or not isinstance(value, int):
            continue
        if name.endswith("context_length"):
            most, has = MOST_CONTEXT, "no model has that many"
        elif name.endswith("block_count"):
            most, has = tensors, f"it has {tensors:,} tensors"
        elif name.endswith(("_length", "_count", "_count_kv", "_size")):
            most, has = widest, f"the largest dimension of its tensors is {widest:,}"
        else:
            continue
        if not 0 <= value <= most:
            raise ValueError(f"its header has {name} {value:,}, and {has}")


class _Reader:
    """Reads values one after the other, within the bounds of the file."""

    def __init__(self, data: mmap) -> None:
        self.data, self.place, self.order = data, len(MAGIC), "<"

    def check_room(self, count: int, each: int, what: str) -> None:
        """Checks that as many things fit into the rest of the file, and are no more than models have.

        :raises ValueError: if not.
        """
        rest = len(self.data) - self.place
        if count > MOST_ENTRIES or count * each > rest:
            raise ValueError(f"its header claims {count:,} {what}, and {rest:,} bytes follow")

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        """Returns numbers of a format of struct."""
        size = struct.calcsize(f"={kind}")
        self.check_room(count, size, "numbers")
        found = struct.unpack_from(f"{self.order}{count}{kind}", self.data, self.place)
        self.place += count * size
        return found

    def text(self) -> str:
        """Returns a string."""
        (size,) = self.numbers("Q", 1)
        self.check_room(size, 1, "characters")
        self.place += size
        return self.data[self.place - size : self.place].decode("utf8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Returns a number or a string; of an array of numbers the largest, and of another one None."""
        if kind in FORMATS:
            return self.numbers(FORMATS[kind], 1)[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth == MOST_NESTED:
            raise ValueError(f"its header has a value of an unknown type {kind}")
        (inner,), (count,) = self.numbers("I", 1), self.numbers("Q", 1)
        if inner in FORMATS:
            return max(self.numbers(FORMATS[inner], count), default=None)
        self.check_room(count, 8, "values")  # the length of a string, or more
        for _ in range(count):
            self.value(inner, depth + 1)
        return None
