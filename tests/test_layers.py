"""Imports point downward only, heavy libraries stay where they belong, and --help is quick."""

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hfbatch

ROOT = Path(hfbatch.__file__).parent
LAYERS = [
    {"cli", "__main__", "options", "terminal", "trainings"},
    {"demo", "doctor", "catalogue"},
    {"job", "finetune"},
    {"cluster", "train"},
    {"verify", "plan", "report", "charts", "attention", "progress", "status", "describe"},
    {"compute"},
    {"tasks", "engines"},
    {"data"},
    {"finetune_spec"},
    {"spec", "errors", "display", "supervisor", "plain_yaml"},
]
"""Top to bottom: the first part of a module's name below hfbatch."""
RANKS = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
STRANGERS = [{"tasks", "engines"}, {"cluster", "train"}, {"demo", "doctor"}, {"job", "finetune"}]
"""Neighbours in a layer that never import each other."""
HOMES = {
    "ray": {"cluster", "train"},
    "torch": {"compute", "engines", "tasks", "train"},
    "transformers": {"compute", "engines", "tasks", "train"},
    "sentence_transformers": {"train"},
    "typer": {"cli", "__main__", "options", "terminal"},
}
"""The only units that may import a library."""
HEAVY = ("torch", "transformers", "ray", "pyarrow", "pandas")
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def unit_of(module: Path) -> str:
    return module.with_suffix("").parts[0]


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


def faults_of(module: Path, source: str) -> list[str]:
    unit, faults = unit_of(module), []
    for line, name in imports_of(source):
        place, (library, _, rest) = f"{module}:{line} imports {name}", name.partition(".")
        if name == "relative":
            faults.append(f"{module}:{line} has a relative import; write it from hfbatch on")
        if unit not in HOMES.get(library, {unit}):
            faults.append(f"{place}; only {sorted(HOMES[library])} may")
        target = rest.partition(".")[0]
        if library != "hfbatch" or target in ("", "__version__", unit):
            continue
        if target not in RANKS:
            faults.append(f"{place}; {target!r} is in no layer (import it from its own module)")
        elif RANKS[target] < RANKS[unit] or any({unit, target} <= pair for pair in STRANGERS):
            faults.append(f"{place}; {target!r} is not below {unit!r}")
    return faults


def test_every_module_is_in_a_layer():
    assert {unit_of(module) for module in MODULES} <= set(RANKS)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_downward(module):
    assert faults_of(module, (ROOT / module).read_text(encoding="utf8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data/reader.py", "import hfbatch.plan"),
        ("spec.py", "def late():\n    from hfbatch.tasks.base import Task"),
        ("tasks/embedding.py", "from hfbatch.engines import torch"),
        ("tasks/__init__.py", "HOMES = {'torch': 'hfbatch.engines.torch:Torch'}"),
        ("plan.py", "import ray.data"),
        ("doctor.py", "import torch"),
        ("data/reader.py", "from . import splits"),
        ("plan.py", "from hfbatch import JobSpec"),
        ("demo.py", "from hfbatch.doctor import examine"),
    ],
)
def test_an_import_that_points_upward_is_found(module, source):
    assert faults_of(Path(module), source)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_says_what_it_is_and_fits_a_reader(module):
    source = (ROOT / module).read_text(encoding="utf8")
    assert ast.get_docstring(ast.parse(source)), f"{module} has no docstring"
    assert len(source.splitlines()) <= 400, f"{module} is longer than 400 lines; divide it"


def test_help_takes_less_than_half_a_second():
    command = Path(sys.executable).with_name("hfbatch")
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
    assert "Usage" in done.stdout
    assert min(seconds) < 0.5, f"--help took {min(seconds):.2f} s at best of 5"


def test_help_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from hfbatch.cli import app\n"
        "try:\n    app(['--help'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
