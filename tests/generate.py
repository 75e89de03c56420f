"""Writes the parts of the repository that are generated from the package: `python -m tests.generate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hfbatch.spec.schema import json_schema
from hfbatch.tasks import TASKS, task_class

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SCHEMA = ROOT / "hfbatch/docs/spec.schema.json"


def schema_text() -> str:
    """The file that the specs in jobs/ refer to."""
    return json.dumps(json_schema(), indent=2) + "\n"


def tasks_table() -> str:
    """The table of tasks in the README."""
    rows = [f"| `{name}` | {task_class(name).summary} |" for name in TASKS]
    return "\n".join(["| task | description |", "|---|---|", *rows]) + "\n"


def with_table(readme: str) -> str:
    """The README with its table of tasks replaced by the current one."""
    table = tasks_table()
    return re.sub(r"\| task \| description \|\n(\|.*\n)+", lambda _: table, readme)


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf8")
    README.write_text(with_table(README.read_text(encoding="utf8")), encoding="utf8")
