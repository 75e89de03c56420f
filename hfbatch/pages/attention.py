"""Plots attention weights: all heads as a grid of small maps, or one head in full. Imports no model code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfbatch.errors import SpecError
from hfbatch.runtime.attention import Attention

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
INCH_A_TOKEN = {"map": 0.12, "grid": 0.09}
"""Size of a token: labels are legible for one head, and only enlarged or in an SVG for a grid."""
LEAST_INCHES = {"map": 4.0, "grid": 1.5}
DOTS_AN_INCH = 150
MOST_INCHES = 50
"""Maximum side of all maps together: 7,500 pixels."""


def draw(attention: Attention, out: Path, layer: int | None = None, head: int | None = None) -> None:
    """Writes the figure as PNG or SVG, by the file's ending; the same weights always give the same SVG.

    :param layer: only this layer, from 0.
    :param head: only this head, from 0.
    :raises SpecError: for another ending, or a layer or head that does not exist.
    """
    import matplotlib

    check_ending(out)
    layers, heads = _chosen(attention, layer, head)
    figure = _grid(attention, layers, heads)
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "attention"}
    metadata = {"Date": None} if out.suffix.lower() == ".svg" else None
    with matplotlib.rc_context(fixed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # tokens may be in any script
        figure.savefig(out, dpi=DOTS_AN_INCH, metadata=metadata)


def check_ending(out: Path) -> None:
    """Checks the ending of a file. :raises SpecError: if it is neither PNG nor SVG."""
    if out.suffix.lower() not in ENDINGS:
        raise SpecError(
            f"--out {str(out)!r} ends in {out.suffix or 'nothing'!r}; use one of {', '.join(ENDINGS)}"
        )


def _chosen(attention: Attention, layer: int | None, head: int | None) -> tuple[list[int], list[int]]:
    """Returns the numbers of the layers and heads to plot."""
    found, faults = [], []
    for name, number, count in zip(
        ("layer", "head"), (layer, head), attention.weights.shape[:2], strict=True
    ):
        if number is not None and not 0 <= number < count:
            faults.append(f"--{name} {number} does not exist; the model has {name}s 0 to {count - 1}")
        found.append(list(range(count)) if number is None else [number])
    if faults:
        raise SpecError(faults)
    return found[0], found[1]


def _grid(attention: Attention, layers: list[int], heads: list[int]) -> Figure:
    """Plots a row of maps for each layer, a column for each head; tokens at the left and the lower edge."""
    from matplotlib.figure import Figure

    kind = "map" if len(layers) == len(heads) == 1 else "grid"
    side = max(INCH_A_TOKEN[kind] * len(attention.tokens), LEAST_INCHES[kind])
    side = min(side, MOST_INCHES / max(len(layers), len(heads)))
    figure = Figure(figsize=(side * len(heads) + 1.5, side * len(layers) + 1.5), layout="constrained")
    cells = figure.subplots(len(layers), len(heads), squeeze=False)
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            axes = cells[row, column]
            axes.imshow(attention.weights[layer, head], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"layer {layer}, head {head}", fontsize=8)
            size = 72 * side / max(len(attention.tokens), 1) * 0.7
            _label(axes, attention.tokens, min(size, 9), column == 0, row == len(layers) - 1)
    return figure


def _label(axes: Axes, tokens: list[str], size: float, left: bool, below: bool) -> None:
    """Labels the given edges with the tokens."""
    places = np.arange(len(tokens))
    axes.set_yticks(places if left else [], tokens if left else [], fontsize=size)
    axes.set_xticks(places if below else [], tokens if below else [], fontsize=size, rotation=90)
    axes.tick_params(length=0, pad=2)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
