"""One file per task: columns to features, features to output columns.

A new task is one new file here, `some_task.py` for `some-task`, with a subclass of `Task` of that name. What
several tasks share is in `parts`.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

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
    return {alias: name for name in TASKS for alias in task_class(name).aliases}


def task_class(name: str) -> type[Task]:
    """The class of a task, by its name or an alias. :raises SpecError: for an unknown name."""
    found = name if name in TASKS else aliases().get(name)
    if found is None:
        raise SpecError(f"unknown task {name!r}; choose one of: {', '.join(TASKS)}")
    module = import_module(f"{__name__}.{found.replace('-', '_')}")
    return next(cls for cls in vars(module).values() if getattr(cls, "name", None) == found)
