"""Training recipes, one file per task: convert labelled rows to tensors and predictions to metrics.

To add a task, add one file, `some_task.py` for `some-task`, with a subclass of `Recipe` of that name. The other
files hold code that several recipes share.
"""

from importlib import import_module
from pkgutil import iter_modules

from hfbatch.errors import SpecError
from hfbatch.tasks import TASKS, task_class
from hfbatch.train.recipes.base import Recipe

RECIPES = tuple(
    sorted(
        module.name.replace("_", "-")
        for module in iter_modules(__path__)
        if module.name.replace("_", "-") in TASKS
    )
)


def recipe_class(name: str) -> type[Recipe]:
    """Returns the recipe of a task, by its name or an alias. :raises SpecError: if the task cannot be trained."""
    name = task_class(name).name
    if name not in RECIPES:
        raise SpecError(f"task {name!r} cannot be trained; choose one of: {', '.join(RECIPES)}")
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    classes = (cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Recipe))
    return next(cls for cls in classes if getattr(cls, "name", None) == name)
