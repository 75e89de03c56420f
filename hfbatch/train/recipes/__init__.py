"""One file per task that can be trained: rows with labels to tensors, predictions to metrics.

A new one is one new file here, `some_task.py` for `some-task`, with a subclass of `Recipe` of that name.
"""

from importlib import import_module
from pkgutil import iter_modules

from hfbatch.errors import SpecError
from hfbatch.tasks import task_class
from hfbatch.train.recipes.base import Recipe

RECIPES = tuple(
    sorted(module.name.replace("_", "-") for module in iter_modules(__path__) if module.name != "base")
)


def recipe_class(name: str) -> type[Recipe]:
    """The recipe of a task, by the task's name or an alias. :raises SpecError: for one that cannot be trained."""
    name = task_class(name).name
    if name not in RECIPES:
        raise SpecError(f"task {name!r} cannot be trained; choose one of: {', '.join(RECIPES)}")
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    classes = (cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Recipe))
    return next(cls for cls in classes if getattr(cls, "name", None) == name)
