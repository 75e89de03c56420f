"""Tasks: each turns columns into features, and model outputs into output columns.

A new task is one new file in the folder of its kind: `some_task.py` for `some-task`, with a subclass of `Task` whose
`name` is "some-task". Base classes that tasks share are in the same folders.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hfbatch.errors import SpecError
from hfbatch.tasks.base import Task

KINDS = ("text", "generation", "vision", "audio", "multimodal")
"""Subpackages that hold tasks."""
ENDPOINT = "endpoint"
"""The subpackage that holds those for engine http: `endpoint-embedding` stands for task embedding there."""


def _modules(kinds: Iterable[str]) -> dict[str, str]:
    """Maps task names to modules. Reads the source files, because importing all of them takes seconds."""
    found = {}
    for kind in kinds:
        for path in (Path(__file__).parent / kind).glob("*.py"):
            name = path.stem.replace("_", "-")
            if re.search(
                rf"""^    name(: .+)? = ["']{name}["']""", path.read_text(encoding="utf8"), re.MULTILINE
            ):
                found[name] = f"{__name__}.{kind}.{path.stem}"
    return dict(sorted(found.items()))


_MODULES = _modules(KINDS)
TASKS = tuple(_MODULES)
"""Names of all tasks whose models run here."""
_MODULES |= _modules([ENDPOINT])
ENDPOINT_TASKS = tuple(name for name in _MODULES if name not in TASKS)


@cache
def aliases() -> dict[str, str]:
    """Maps aliases to task names."""
    return {alias: name for name in TASKS for alias in _load(name).aliases}


def task_class(name: str) -> type[Task]:
    """Returns the class of a task, given its name or an alias. :raises SpecError: for an unknown name."""
    return named(name)[0]


def named(name: str) -> tuple[type[Task], dict[str, Any]]:
    """Returns the class of a task, and the params that the given name implies.

    :raises SpecError: for an unknown name.
    """
    for known in [name] if name in _MODULES else TASKS:
        params = _load(known).params_of(name)
        if params is not None:
            return _load(known), params
    alike = "".join(f"; did you mean {known!r}?" for known in get_close_matches(name, TASKS, 1))
    raise SpecError(f"unknown task {name!r}; choose one of: {', '.join(TASKS)}{alike}")


def endpoint_task(name: str) -> str:
    """Returns the task that engine http runs in place of another one. :raises SpecError: if there is none."""
    name = name if name in ENDPOINT_TASKS else f"{ENDPOINT}-{named(name)[0].name}"
    if name in ENDPOINT_TASKS:
        return name
    able = ", ".join(one.removeprefix(f"{ENDPOINT}-") for one in ENDPOINT_TASKS)
    raise SpecError(
        f"engine http: endpoints answer {able}, not {name.removeprefix(f'{ENDPOINT}-')}; run that task with engine torch"
    )


def _load(name: str) -> type[Task]:
    module = import_module(_MODULES[name])
    return next(cls for cls in vars(module).values() if getattr(cls, "name", None) == name)
