"""A task never changes after it is built. Read from the source, so that no code path is left out."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.layers import MODULES, ROOT

TREES = {module: ast.parse((ROOT / module).read_text(encoding="utf8")) for module in MODULES}


def classes_of_tasks() -> set[str]:
    """Names of `Task` and of all classes below it."""
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"Task"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def changes(node: ast.AST, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ast.expr, str]]:
    """Each attribute that is set or deleted: the classes and functions around it, its owner, its name."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Attribute(ctx=ast.Store() | ast.Del(), value=owner, attr=name):
                yield where, owner, name
            case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[owner, name, *_]):
                yield where, owner, ast.unparse(name)
        inside = (*where, child.name) if isinstance(child, ast.ClassDef | ast.FunctionDef) else where
        yield from changes(child, inside)


def changes_of_tasks(tree: ast.AST, tasks: set[str]) -> list[str]:
    """Changes of a variable or attribute named `task`, and of `self` in tasks but in `__init__` and private caches."""
    found = []
    for where, owner, name in changes(tree):
        shown = ast.unparse(owner)
        own = shown == "self" and bool(tasks.intersection(where)) and where[-1] != "__init__"
        if shown.rpartition(".")[2] == "task" or (own and not name.startswith("_")):
            found.append(f"{'.'.join(where)}: {shown}.{name}")
    return found


def test_nothing_sets_an_attribute_of_a_task_that_is_built() -> None:
    tasks = classes_of_tasks()
    assert len(tasks) > 40
    found = {str(module): changes_of_tasks(TREES[module], tasks) for module in MODULES}
    assert {module: faults for module, faults in found.items() if faults} == {}


def test_the_changes_that_it_looks_for_are_found() -> None:
    source = """
def run(recipe, task):
    task.files = recipe.task.params = 1
    setattr(recipe.task, "seed", 2)
    recipe.task.batch.size: int = 3
    del task.seed

class Embedding(Task):
    def __init__(self):
        self.auto_class = ""

    def forward(self):
        self._cache, self.params = {}, 1
"""
    assert changes_of_tasks(ast.parse(source), {"Task", "Embedding"}) == [
        "run: task.files",
        "run: recipe.task.params",
        "run: recipe.task.'seed'",
        "run: task.seed",
        "Embedding.forward: self.params",
    ]
