"""Writes the parts of the repository that are generated from the package: `python -m tests.generate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hfbatch.spec.schema import json_schema
from hfbatch.tasks import TASKS, task_class
from tests.cases.every import EXPORTABLE

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ENGINES = ROOT / "hfbatch/docs/engines.md"
SCHEMA = ROOT / "hfbatch/docs/spec.schema.json"


def schema_text() -> str:
    """The file that the specs in jobs/ refer to."""
    return json.dumps(json_schema(), indent=2) + "\n"


def tasks_table() -> str:
    """The table of tasks in the README."""
    rows = [f"| `{name}` | {task_class(name).summary} |" for name in TASKS]
    return "\n".join(["| task | description |", "|---|---|", *rows]) + "\n"


def measures_table() -> str:
    """The table of tasks in the topic on engines: which run on graphs, and how lowered precision is judged."""
    rows = []
    for name in TASKS:
        agreement = task_class(name).agreement
        limits = agreement.limits.items() if agreement else ()
        shown = ", ".join(f"`{measure}` {limit}".rstrip() for measure, limit in limits)
        rows.append(f"| `{name}` | {'yes' if name in EXPORTABLE else 'no'} | {shown or 'not compared'} |")
    return (
        "\n".join(["| task | on `openvino`, `onnx` | measures and limits |", "|---|---|---|", *rows]) + "\n"
    )


def with_table(text: str, table: str) -> str:
    """A text with its table of the same head replaced."""
    head = re.escape(table.splitlines()[0])
    return re.sub(head + r"\n(\|.*\n)+", lambda _: table, text)


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf8")
    README.write_text(with_table(README.read_text(encoding="utf8"), tasks_table()), encoding="utf8")
    ENGINES.write_text(with_table(ENGINES.read_text(encoding="utf8"), measures_table()), encoding="utf8")
