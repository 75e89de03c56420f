"""Writes the parts of the repository that are generated from the package: `python -m tests.generate`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter

from hfbatch.engines import ENGINES
from hfbatch.engines.base import Capability
from hfbatch.runtime.checks import engine_faults
from hfbatch.spec.engines import EngineSpec
from hfbatch.spec.schema import json_schema
from hfbatch.tasks import TASKS, task_class
from hfbatch.tasks.base import Task
from tests.cases.every import CASES
from tests.tasks.drive import make

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ENGINES_TOPIC = ROOT / "hfbatch/docs/engines.md"
SCHEMA = ROOT / "hfbatch/docs/spec.schema.json"


def schema_text() -> str:
    """The file that the specs in jobs/ refer to."""
    return json.dumps(json_schema(), indent=2) + "\n"


def tasks_table() -> str:
    """The table of tasks in the README."""
    rows = [f"| `{name}` | {task_class(name).summary} |" for name in TASKS]
    return "\n".join(["| task | description |", "|---|---|", *rows]) + "\n"


HEAD = "| task | on `openvino`, `onnx` | quantised weights in `torch` | measures and limits |"
Support = Mapping[str, tuple[str, str]]
"""By task: whether it runs on graphs, and whether `torch` quantises the weights of its models."""


def measures_table(support: Support) -> str:
    """The table of tasks in the topic on engines: what can be lowered, and how lowered precision is judged."""
    rows = []
    for name in TASKS:
        agreement = task_class(name).agreement
        limits = agreement.limits.items() if agreement else ()
        shown = ", ".join(f"`{measure}` {limit}".rstrip() for measure, limit in limits)
        rows.append(f"| `{name}` | {' | '.join(support[name])} | {shown or 'not compared'} |")
    return "\n".join([HEAD, "|---|---|---|---|", *rows]) + "\n"


def shown_support(text: str) -> Support:
    """What a text with this table says of each task."""
    rows = (line.split(" | ") for line in text.partition(HEAD)[2].splitlines()[2 : 2 + len(TASKS)])
    return {name.strip("| `"): (graphs, weights) for name, graphs, weights, _ in rows}


def support_of(name: str, folder: Path) -> tuple[str, str]:
    """What the plan says of a task with the model of its case. Writes that model into a folder."""
    case = CASES[name]
    task = make(task_class(name), case.build(folder), **case.params)
    needs = [need.value for need in Capability if need in task.asks - ENGINES["openvino"].answers]
    faults = {one: faults_of(task, "torch", one) for one in ENGINES["torch"].quantizations}
    able = [f"`{one}`" for one, found in faults.items() if not found]
    graphs = f"no: needs {' and '.join(needs)}" if needs else "yes"
    return graphs, "yes" if len(able) == len(faults) else ", ".join(able) or "no"


def faults_of(task: Task, engine: str, quantization: str) -> list[str]:
    """What the plan says against a quantisation."""
    spec: EngineSpec = TypeAdapter(EngineSpec).validate_python({"name": engine, "quantization": quantization})
    return engine_faults(spec, "float32", task)


def support() -> Support:
    """What the plan says of every task; takes half a minute, for the models of all."""
    if lacking := [name for name in TASKS if name not in CASES]:
        raise SystemExit(
            f"no case of {', '.join(lacking)}; add one to a file of tests/cases/ (hfbatch docs extending)"
        )
    with TemporaryDirectory() as folder:
        return {name: support_of(name, Path(folder, name)) for name in TASKS}


def with_table(text: str, table: str) -> str:
    """A text with its table of the same head replaced."""
    head = re.escape(table.splitlines()[0])
    return re.sub(head + r"\n(\|.*\n)+", lambda _: table, text)


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf8")
    README.write_text(with_table(README.read_text(encoding="utf8"), tasks_table()), encoding="utf8")
    table = measures_table(support())
    ENGINES_TOPIC.write_text(with_table(ENGINES_TOPIC.read_text(encoding="utf8"), table), encoding="utf8")
