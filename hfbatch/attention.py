"""Draws attention weights: all heads as a grid of small maps, or one head in full. Knows nothing of models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfbatch.compute.attention import Attention
from hfbatch.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
INCH_A_TOKEN = {"map": 0.12, "grid": 0.09}
"""How large a token is drawn: labels of one head can be read, those of a grid with a lens or in an SVG."""
LEAST_INCHES = {"map": 4.0, "grid": 1.5}
DOTS_AN_INCH = 150
MOST_INCHES = 50
"""Largest side of all maps together: 7,500 pixels."""


def draw(attention: Attention, out: Path, layer: int | None = None, head: int | None = None) -> None:
    """Writes the picture: PNG or SVG, by the file's ending; the same weights always give the same SVG.

    :param layer: this layer alone, from 0.
    :param head: this head alone, from 0.
    :raises SpecError: for another ending, and a layer or head that is not there.
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
    """:raises SpecError: for a file that is no picture by its ending."""
    if out.suffix.lower() not in ENDINGS:
        raise SpecError(
            f"--out {str(out)!r} ends in {out.suffix or 'nothing'!r}; use one of {', '.join(ENDINGS)}"
        )


def _chosen(attention: Attention, layer: int | None, head: int | None) -> tuple[list[int], list[int]]:
    """Numbers of the layers and heads to draw."""
    found, faults = [], []
    for name, number, count in zip(
        ("layer", "head"), (layer, head), attention.weights.shape[:2], strict=True
    ):
        if number is not None and not 0 <= number < count:
            faults.append(f"--{name} {number} is not there; the model has {name}s 0 to {count - 1}")
        found.append(list(range(count)) if number is None else [number])
    if faults:
        raise SpecError(faults)
    return found[0], found[1]


def _grid(attention: Attention, layers: list[int], heads: list[int]) -> Figure:
    """A row of maps for each layer, a column for each head; tokens along the left and the lower edge."""
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
    """Tokens at the edges that are asked for."""
    places = np.arange(len(tokens))
    axes.set_yticks(places if left else [], tokens if left else [], fontsize=size)
    axes.set_xticks(places if below else [], tokens if below else [], fontsize=size, rotation=90)
    axes.tick_params(length=0, pad=2)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
