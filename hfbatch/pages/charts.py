"""Charts of the reports as inline SVG, drawn by matplotlib from numbers and labels.

Colours are CSS variables of the page, so that one chart fits a light and a dark page; text stays text, in the page's
own font. The same numbers always give the same bytes.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from hfbatch.console.progress import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 380
"""Width of a chart in its own units, close to the pixels of a phone, so that text stays legible there."""
FONT = 12
ROW = 36
"""Height of a labelled bar."""
INK, MUTED, ACCENT, SOFT, GRID, WARN = (f"#{k:02x}fe{k:02x}" for k in range(1, 7))
"""Placeholder colours that `_inline` replaces by COLOURS."""
COLOURS = dict(
    zip(
        (INK, MUTED, ACCENT, SOFT, GRID, WARN),
        ("currentColor", "var(--muted)", "var(--accent)", "var(--soft)", "var(--grid)", "var(--warn)"),
        strict=True,
    )
)
MOST_LABEL = 44
LETTER = 7.5
"""Approximate width of a character."""
MOST_CUT = 5
"""Minimum characters of a truncated label; below, labels are numbered."""
LEAST_BINS = 8
MOST_STEPS = 60


def preload() -> None:
    """Imports in a thread what draws the charts, which takes half a second."""
    threading.Thread(target=import_module, args=("matplotlib.figure",), daemon=True).start()


def throughput(timeline: Sequence[Mapping[str, float]], start_up: float, mean: float | None) -> str:
    """Plots rows per second between commits over the seconds since the command began; "" with too few commits.

    :param timeline: `seconds` and cumulative `rows` at each commit, in order.
    :param start_up: seconds before the first batch, shown as such.
    :param mean: mean rows per second, drawn as a line.
    """
    seconds = np.array([point["seconds"] for point in timeline], float)
    rows = np.array([point["rows"] for point in timeline], float)
    begin = min(start_up, float(seconds[0]) if len(seconds) else 0.0)
    if not len(seconds) or seconds[-1] <= begin or rows[-1] <= 0:
        return ""
    steps = min(len(np.unique(seconds)), MOST_STEPS)
    edges = np.linspace(begin, seconds[-1], steps + 1)
    rates = np.diff(np.interp(edges, [begin, *seconds], [0.0, *rows])) / np.diff(edges)
    figure, axes = _axes(220)
    axes.stairs(rates, edges, fill=True, color=SOFT, linewidth=0)
    axes.stairs(rates, edges, baseline=None, color=ACCENT, linewidth=2)
    top = max(rates.max(), mean or 0.0) * 1.2
    if mean:
        axes.hlines(mean, begin, seconds[-1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        _text(axes, seconds[-1], top, f"mean {compact(mean)} rows/s", color=MUTED, ha="right", va="top")
    axes.set_xlim(0, seconds[-1])
    axes.set_ylim(0, top)
    if begin > 0.2 * seconds[-1]:
        _text(axes, begin / 2, top * 0.5, "start-up", color=MUTED, ha="center", va="center")
    axes.set_xlabel("seconds since the command began", color=MUTED, fontsize=FONT)
    return _svg(figure, "throughput", "Rows per second over time")


def histogram(name: str, edges: Sequence[float], counts: Sequence[int], xlabel: str) -> str:
    """Plots the rows in each bin, all bins equally wide; "" if all are empty.

    :param name: an identifier that is unique in the page.
    :param edges: bin edges, one more than counts.
    """
    filled = np.flatnonzero(counts)
    if not len(filled):
        return ""
    low, high = int(filled[0]), int(filled[-1]) + 1
    while high - low < min(LEAST_BINS, len(counts)):
        low, high = max(low - 1, 0), min(high + 1, len(counts))
    shown, marks = np.asarray(counts)[low:high], list(edges)[low : high + 1]
    figure, axes = _axes(220)
    axes.bar(np.arange(len(shown)) + 0.5, shown, width=0.86, color=ACCENT, linewidth=0)
    every = -(-len(marks) // 8)
    at = list(range(0, len(marks), every))
    axes.set_xticks(at, [compact_edge(marks[k]) for k in at])
    axes.set_xlim(0, len(shown))
    axes.set_ylim(0, shown.max() * 1.08)
    axes.set_xlabel(_clean(xlabel), color=MUTED, fontsize=FONT, parse_math=False)
    return _svg(figure, name, f"Rows by {xlabel}")


def bars(name: str, values: Mapping[str, float], shown: Sequence[str], title: str, warn: bool = False) -> str:
    """Plots a labelled horizontal bar for each value; "" if there are none.

    :param name: an identifier that is unique in the page.
    :param values: labels to lengths, in order; labels may be any text.
    :param shown: the value of each bar as text.
    :param warn: draw in the colour of warnings.
    """
    if not values:
        return ""
    figure, axes = _blank(ROW * len(values))
    longest = max(max(values.values()), 1e-12)
    for k, ((label, value), words) in enumerate(zip(values.items(), shown, strict=True)):
        top = ROW * k
        _text(axes, 0, top + 11, _clean(label), va="center")
        _text(axes, WIDTH, top + 11, words, color=MUTED, ha="right", va="center")
        axes.barh(top + 25, WIDTH, height=8, color=GRID, linewidth=0)
        axes.barh(
            top + 25, WIDTH * max(value, 0) / longest, height=8, color=WARN if warn else ACCENT, linewidth=0
        )
    return _svg(figure, name, title)


def share(name: str, parts: Sequence[tuple[str, float]], title: str) -> str:
    """Plots one bar divided into two parts, each labelled with its share; "" if both are zero.

    :param parts: label and amount of the parts; the second one is waste.
    """
    (first, wanted), (second, waste) = parts
    whole = wanted + waste
    if whole <= 0:
        return ""
    figure, axes = _blank(64)
    axes.barh(20, WIDTH, height=26, color=WARN, linewidth=0)
    axes.barh(20, WIDTH * wanted / whole, height=26, color=ACCENT, linewidth=0)
    _text(axes, 0, 52, f"{_clean(first)} {wanted / whole:.1%}", va="center")
    _text(axes, WIDTH, 52, f"{_clean(second)} {waste / whole:.1%}", color=WARN, ha="right", va="center")
    return _svg(figure, name, title)


def lines(
    name: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    title: str,
    level: tuple[str, float] | None = None,
) -> str:
    """Plots one or two lines over a common x axis, with a legend; "" if no line has a point.

    :param name: an identifier that is unique in the page.
    :param series: labels to points (x, y) with ascending x; values that are not finite are left out.
    :param level: label and value of a horizontal line to compare with.
    """
    figure, axes = _axes(220)
    legend = []
    for (label, points), colour in zip(series.items(), (ACCENT, WARN), strict=False):
        kept = np.array([point for point in points if np.isfinite(point[1])], float).reshape(-1, 2)
        if len(kept):
            marker = "o" if len(kept) <= MOST_STEPS // 2 else None
            axes.plot(kept[:, 0], kept[:, 1], color=colour, linewidth=2, marker=marker, markersize=4)
            legend.append((label, colour))
    if not legend:
        return ""
    if level:
        axes.axhline(level[1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        legend.append((level[0], MUTED))
    axes.margins(y=0.25)
    for at, (label, colour) in enumerate(legend):
        axes.text(
            0.02 + 0.34 * at, 0.99, _clean(label), color=colour, fontsize=FONT, parse_math=False,
            transform=axes.transAxes, va="top",
        )  # fmt: skip
    axes.set_xlabel(_clean(xlabel), color=MUTED, fontsize=FONT, parse_math=False)
    return _svg(figure, name, title)


def matrix(name: str, labels: Sequence[str], counts: Sequence[Sequence[int]], title: str) -> str:
    """Plots counts by true (rows) and predicted label (columns), shaded by their share of the row; "" without labels.

    Labels that do not fit over their columns are numbered.

    :param name: an identifier that is unique in the page.
    """
    if not labels:
        return ""
    table, side, left, top = np.asarray(counts, float), len(labels), 96.0, 40.0
    cell = (WIDTH - left) / side
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    figure, axes = _blank(round(top + cell * side))
    letters = int(cell / LETTER)
    short = letters < MOST_CUT and any(len(label) > letters for label in labels)
    for row, label in enumerate(labels):
        middle, number = cell * (row + 0.5), str(row + 1)
        words = f"{_cut(label, 9)} {number}" if short else _cut(label, 12)
        _text(axes, left - 6, top + middle, words, ha="right", va="center")
        over = number if short else _cut(label, letters)
        _text(axes, left + middle, 28, over, color=MUTED, ha="center", va="center")
        for column in range(side):
            colour = ACCENT if row == column else WARN
            corner = (left + cell * column, top + cell * row)
            _cell(axes, corner, cell, colour, float(shares[row, column]), table[row, column])
    _text(axes, left, 10, "guess", color=MUTED, va="center")
    _text(axes, left - 6, 28, "truth", color=MUTED, ha="right", va="center")
    return _svg(figure, name, title)


def _cell(
    axes: Axes, corner: tuple[float, float], side: float, colour: str, share: float, number: float
) -> None:
    """Draws a cell of a matrix, with its number if that fits."""
    middle, words = corner[1] + side / 2, compact(number)
    for fill, alpha in ((GRID, 1.0), (colour, round(0.75 * share, 3))):
        axes.barh(middle, side - 1, height=side - 1, left=corner[0], color=fill, alpha=alpha, linewidth=0)
    if number and max(len(words), 3) * LETTER < side:
        _text(axes, corner[0] + side / 2, middle, words, ha="center", va="center")


def compact_edge(edge: float) -> str:
    """Formats a bin edge for an axis: 0.25, 96, 16k."""
    if abs(edge) >= 1024 and edge == int(edge) and int(edge) % 1024 == 0:
        return f"{int(edge) // 1024}k" if abs(edge) < 1 << 20 else f"{edge / (1 << 20):g}M"
    return f"{edge:.4g}"


def _axes(height: int) -> tuple[Figure, Axes]:
    """Returns a figure with a value axis on the left and minimal decoration."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((44 / WIDTH, 42 / height, (WIDTH - 56) / WIDTH, (height - 52) / height))
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=FONT, length=0, pad=6)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    return figure, axes


def _blank(height: int) -> tuple[Figure, Axes]:
    """Returns a figure without axes, in units of the chart, with y downward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.set_autoscale_on(False)
    return figure, axes


def _text(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    axes.text(x, y, text, **{"color": INK, "fontsize": FONT, "parse_math": False, **options})


def _clean(label: str) -> str:
    """Returns a label on one line, without characters that are invalid in XML, truncated to MOST_LABEL."""
    text = label.encode("utf8", "replace").decode("utf8")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= MOST_LABEL else text[: MOST_LABEL - 1] + "…"


def _cut(label: str, letters: int) -> str:
    """Returns a clean label truncated to a number of characters."""
    text = _clean(label)
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _svg(figure: Figure, name: str, title: str) -> str:
    """Renders the figure as an SVG element for a page."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    options = {"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": None}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser chooses the font
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), name, title)


def _inline(document: str, name: str, title: str) -> str:
    """Reduces an SVG document to its element, with unique ids and the page's colours.

    Only changes tags: text is escaped, so it contains no tags.
    """
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)

    def fix(match: re.Match[str]) -> str:
        tag = re.sub(r"font-family: [^;]*; ", "", match[0])
        tag = re.sub(r'\sid="', f' id="{name}-', tag)
        tag = tag.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
        for stand_in, colour in COLOURS.items():
            tag = tag.replace(stand_in, colour)
        return tag

    svg = re.sub(r"<[^>]+>", fix, svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    head = f'<svg {view[0] if view else ""} role="img" aria-label="{escape(title)}">'
    return re.sub(r"^<svg[^>]*>", lambda _: head, svg).strip()
