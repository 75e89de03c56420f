"""Layers whose weights the code of a model reads, instead of calling the layer or besides.

Such a weight must be one of plain numbers: packed into 4 bits, it has another shape and type. WavLM passes the weights of
its attention to a function of torch; LongT5 casts its activations to the type of a weight. Code that replaces layers, such
as that of adapters, has no effect where a layer is not called.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

WEIGHT = re.compile(
    r"(\bisinstance\()?\bself\.([\w.]+)\.(?:weight\b|parameters\(\)\)(?=\.dtype))(\.dtype\b|\.device\b)?"
)
NOT_RUN = re.compile("init|reset|load|save|tie")
"""Names of methods that a forward pass does not call."""


def read_layers(model: Any, values: bool = False) -> set[str]:
    """Returns the names of these layers. Reads the source of the model's classes, and no weights.

    :param values: whether it does not count that only the class, dtype or device of a weight is read.
    """
    modules = dict(model.named_modules())
    reads = {kind: _reads(kind) for kind in {type(module) for module in modules.values()}}
    read = {
        f"{name}.{layer}" if name else layer
        for name, module in modules.items()
        for asks_class, layer, asks_type in reads[type(module)]
        if not (values and (asks_class or asks_type))
    }
    return {_first(name, modules[name]) for name in read & modules.keys()}


def _first(name: str, module: Any) -> str:
    """Returns the layer of the first weight of a module, whose dtype Swin2SR casts a table to."""
    weight = next((weight for weight, _ in module.named_parameters()), "")
    return f"{name}.{weight}".rpartition(".")[0] if "." in weight else name


def _reads(kind: type) -> frozenset[tuple[str, str, str]]:
    """Returns the layers of a class whose weights its methods read, and what of them."""
    return frozenset().union(*map(_own_reads, kind.__mro__))


@cache  # looking for a source takes a millisecond, and most classes have the same bases
def _own_reads(kind: type) -> frozenset[tuple[str, str, str]]:
    return frozenset(found for source in _methods(kind) for found in WEIGHT.findall(source))


def _methods(kind: type) -> Iterator[str]:
    for name, method in vars(kind).items():
        if not inspect.isfunction(method) or NOT_RUN.search(name):
            continue
        if {"weight", "parameters"} & {*inspect.unwrap(method).__code__.co_names}:
            try:
                yield inspect.getsource(method)
            except (OSError, TypeError):  # made at run time
                continue
