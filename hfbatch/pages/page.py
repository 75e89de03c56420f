"""Pages: their templates, and how numbers are formatted in them and in terminals."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hfbatch.console.progress import compact

if TYPE_CHECKING:
    from jinja2 import Template


def count(number: int, noun: str) -> str:
    """Formats a number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def model_words(model: Mapping[str, Any]) -> str:
    """Returns the name of a model, with the beginning of its commit unless an endpoint serves it."""
    name, commit = model["name"], str(model["commit"])
    return name if commit == name else f"{name} @ {commit[:12]}"


def percent(share: float | None) -> str:
    """Formats a share: `4.2%`, `5%`, `< 0.1%`, `–` for None; 100% only if exact."""
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "< 0.1%"
    return f"{min(share, 0.999) if share < 1 else share:.1%}".replace(".0%", "%")


def seconds_in_words(seconds: float | None) -> str:
    """Formats a duration: `0.42 s`, `12.3 s`, `3 min 5 s`, `2 h 14 min`."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 0.995 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours:,} h {left} min" if hours else f"{minutes} min {rest} s"


def rate(number: float | None) -> str:
    """Formats a rate without its unit; `–` for None."""
    return "–" if number is None else compact(number)


def render_page(template: str, figures: Mapping[str, str], **values: Any) -> str:
    """Renders a self-contained page, without scripts, links or files. All text in it is escaped.

    :param template: a file of this package.
    :param figures: SVG elements by name, `charts` in the template.
    """
    from markupsafe import Markup

    folder = files("hfbatch.pages")
    page = _template(template)
    drawn = {name: Markup(svg) for name, svg in figures.items()}  # noqa: S704 - charts escape their labels
    style = Markup(folder.joinpath("style.css.j2").read_text(encoding="utf8"))  # noqa: S704 - our own file
    return page.render(charts=drawn, style=style, **values)


@cache
def _template(name: str) -> Template:
    """Compiles a template of this package."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=percent,
        seconds=seconds_in_words,
        rate=rate,
        count=count,
        compact=compact,
        thousands="{:,}".format,
    )
    return environment.from_string(files("hfbatch.pages").joinpath(name).read_text(encoding="utf8"))
