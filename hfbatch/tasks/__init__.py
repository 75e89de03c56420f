"""One file per task: columns to features, features to output columns.

A new task is one new file here with a subclass of `Task`, and its line in `TASKS`.
"""

from importlib import import_module

from hfbatch.errors import SpecError
from hfbatch.tasks.base import Task

TASKS = {
    "embedding": "hfbatch.tasks.embedding:Embedding",
    "text-classification": "hfbatch.tasks.text_classification:TextClassification",
    "text-generation": "hfbatch.tasks.text_generation:TextGeneration",
}
ALIASES = {"sentiment-analysis": "text-classification"}


def task_class(name: str) -> type[Task]:
    """The class of a task, by its name or an old alias. :raises SpecError: for an unknown name."""
    home = TASKS.get(ALIASES.get(name, name))
    if home is None:
        raise SpecError(f"unknown task {name!r}; choose one of: {', '.join(TASKS)}")
    module, _, attribute = home.partition(":")
    return getattr(import_module(module), attribute)
