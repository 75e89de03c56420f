"""The rooms of the package and who may import whom. `python -m tests.layers` prints them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import hfbatch

ROOT = Path(hfbatch.__file__).parent
ROOMS = (
    "cli",
    "train",
    "train.loop",
    "train.recipes",
    "train.data",
    "train.metrics",
    "serve",
    "predict",
    "pages",
    "cluster",
    "runtime",
    "tasks.endpoint",
    "tasks.multimodal",
    "tasks.audio",
    "tasks.vision",
    "tasks.text",
    "tasks.pipelines",
    "tasks.generation",
    "tasks",
    "engines",
    "output.sinks",
    "output",
    "data",
    "data.formats",
    "hub",
    "spec",
    "console",
    "",
)
"""Folders from top to bottom: a file imports from its own folder and from those below. `""` is the package itself."""
LIBRARIES = {
    "ray": ("cluster", "serve", "train"),
    "fastapi": ("serve",),
    "torch": ("runtime", "engines", "tasks", "train"),
    "transformers": ("runtime", "engines", "tasks", "train"),
    "sentence_transformers": ("train",),
    "typer": ("cli",),
}
"""The only rooms, those within them too, that may import a library."""
LAZY = ("__init__", "__main__")
"""Files of the package itself that import upwards, inside functions, for `import hfbatch` and `python -m hfbatch`."""
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def name_of(module: Path) -> str:
    """`data/reader.py` as `data.reader`, `tasks/__init__.py` as `tasks`."""
    return ".".join(part for part in module.with_suffix("").parts if part != "__init__")


NAMES = {name_of(module): module for module in MODULES}


def room_of(module: Path) -> str:
    """The folder of a file."""
    return ".".join(module.parent.parts)


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of whatever a source imports, also inside functions and by a string."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(level=0, module=str(module), names=names):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.ImportFrom():
                yield node.lineno, "relative"
            case ast.Constant(value=str(text)) if re.fullmatch(r"hfbatch(\.\w+)+(:\w+)?", text):
                yield node.lineno, text.partition(":")[0]


def target_of(name: str) -> Path | None:
    """The file of this package that an import reads, if it reads one."""
    package, _, rest = name.partition(".")
    if package != "hfbatch":
        return None
    return NAMES.get(rest) or NAMES.get(rest.rpartition(".")[0])


def faults_of(module: Path, source: str) -> list[str]:
    """What is wrong with a file's imports."""
    room, faults = room_of(module), []
    for line, name in imports_of(source):
        place = f"{module}:{line} imports {name}"
        if name == "relative":
            faults.append(f"{module}:{line} has a relative import; write it from hfbatch on")
            continue
        homes = LIBRARIES.get(name.partition(".")[0], (room,))
        if not any(room == home or room.startswith(f"{home}.") for home in homes):
            faults.append(f"{place}; only {', '.join(homes)} may")
        target = target_of(name)
        if target is None or (module.stem in LAZY and room == ""):
            continue
        if ROOMS.index(room_of(target)) < ROOMS.index(room):
            faults.append(f"{place}; {room_of(target)!r} is not below {room!r}")
        if target == Path("__init__.py"):
            faults.append(f"{place}; import it from its own module")
    return faults


def graph() -> dict[Path, set[Path]]:
    """Each file and the files that it imports."""
    found = {}
    for module in MODULES:
        targets = {target_of(name) for _, name in imports_of((ROOT / module).read_text(encoding="utf8"))}
        found[module] = {target for target in targets if target and target != module}
    return found


def circles(graph: Mapping[Path, set[Path]]) -> list[list[Path]]:
    """Files that import each other, directly or through others."""
    reached: dict[Path, set[Path]] = {}
    for start in graph:
        seen: set[Path] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo.extend(new)
        reached[start] = seen
    found = {
        tuple(sorted({m, *(o for o in reached[m] if m in reached[o])})) for m in graph if m in reached[m]
    }
    return [list(circle) for circle in sorted(found)]


def show() -> None:
    """Prints each room with its files, and what it imports from others."""
    arrows = defaultdict(set)
    for module, targets in graph().items():
        arrows[room_of(module)] |= {room_of(target) for target in targets} - {room_of(module)}
    for room in ROOMS:
        files = [module for module in MODULES if room_of(module) == room and module.stem != "__init__"]
        below = ", ".join(other or "hfbatch" for other in ROOMS if other in arrows[room])
        print(f"{room or 'hfbatch':18} {len(files):2} files; imports {below or 'nothing'}")


if __name__ == "__main__":
    show()
