"""The documentation that is installed with the package: topics as Markdown files, and generated references."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from hfbatch.console.display import add, say, show
from hfbatch.console.display import table as headed
from hfbatch.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = Path(__file__).parent.parent / "docs"
REFERENCES = {"spec": "job", "finetune-spec": "finetune"}
"""Topics that end with the generated reference of a spec, and the kind of the spec."""
EXAMPLES = {
    "The smallest task": "generation/text2text_generation.py",
    "A task with steps of its own": "text/text_classification.py",
}
"""The files of `hfbatch/tasks` that the topic `extending` ends with."""


def list_topics() -> list[dict[str, str]]:
    """Name, title and summary of each topic: the heading and the first paragraph of its file."""
    return [_head(path) for path in sorted(FOLDER.glob("*.md"))]


def read_topic(name: str) -> str:
    """A topic as Markdown. :raises SpecError: for an unknown topic."""
    known = [topic["topic"] for topic in list_topics()]
    if name not in known:
        alike = "".join(f"; did you mean {near!r}?" for near in get_close_matches(name, known, 1))
        raise SpecError(f"unknown topic {name!r}; choose one of: {', '.join(known)}{alike}")
    text = (FOLDER / f"{name}.md").read_text(encoding="utf8")
    if name in REFERENCES:
        from hfbatch.cli.reference import spec_reference

        text += "\n" + spec_reference(REFERENCES[name])
    if name == "extending":
        for title, path in EXAMPLES.items():
            source = (FOLDER.parent / "tasks" / path).read_text(encoding="utf8")
            text += f"\n## {title}\n\n```py\n{source}```\n"
    return text


def render_topics(topics: list[dict[str, str]], console: Console) -> None:
    """Prints the list."""
    table = headed(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for topic in topics:
        add(table, topic["topic"], topic["summary"])
    show(console, table)
    say(console, "`hfbatch docs TOPIC` shows one topic.")


def _head(path: Path) -> dict[str, str]:
    title, _, summary, *_ = path.read_text(encoding="utf8").splitlines()
    return {"topic": path.stem, "title": title.removeprefix("# "), "summary": summary}
