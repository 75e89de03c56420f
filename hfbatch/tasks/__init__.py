"""One file per task: columns to features, features to output columns.

A new task is one new file here, `some_task.py` for `some-task`, with a subclass of `Task` of that name. What
several tasks share is in `parts`.
"""

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from hfbatch.errors import SpecError
from hfbatch.tasks.base import Task

TASKS = tuple(
    sorted(
        module.name.replace("_", "-")
        for module in iter_modules(__path__)
        if not module.ispkg and module.name != "base"
    )
)


@cache
def aliases() -> dict[str, str]:
    """Other names of tasks, and which task each means."""
    return {alias: name for name in TASKS for alias in _load(name).aliases}


def task_class(name: str) -> type[Task]:
    """The class of a task, by its name or an alias. :raises SpecError: for an unknown name."""
    return named(name)[0]


def named(name: str) -> tuple[type[Task], dict[str, Any]]:
    """The class of a task, and the params that this name of it stands for.

    :raises SpecError: for an unknown name.
    """
    for known in [name] if name in TASKS else TASKS:
        params = _load(known).params_of(name)
        if params is not None:
            return _load(known), params
    alike = "".join(f"; did you mean {known!r}?" for known in get_close_matches(name, TASKS, 1))
    raise SpecError(f"unknown task {name!r}; choose one of: {', '.join(TASKS)}{alike}")


def _load(name: str) -> type[Task]:
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    found = [cls for cls in vars(module).values() if getattr(cls, "name", None) == name]
    if not found:
        raise TypeError(
            f"{module.__file__} has no subclass of Task whose name is {name!r}, as the file's name says"
        )
    return found[0]
