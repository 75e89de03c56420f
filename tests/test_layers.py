"""Imports point downward only, heavy libraries stay where they belong, and --help is quick."""

import ast
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.layers import MODULES, ROOMS, ROOT, circles, faults_of, graph, room_of, show

HEAVY = ("torch", "transformers", "ray", "pyarrow", "pandas")
MOST_FILES, MOST_LINES = 25, 400
SOURCES = {module: (ROOT / module).read_text(encoding="utf8") for module in MODULES}


def test_every_file_is_in_a_room_of_a_size_to_know():
    sizes = Counter(room_of(module) for module in MODULES)
    assert set(sizes) == set(ROOMS)
    assert {room: size for room, size in sizes.items() if size > MOST_FILES} == {}


def test_no_file_imports_itself_through_others():
    assert circles(graph()) == []
    a, b, c = Path("a"), Path("b"), Path("c")
    assert circles({a: {b}, b: {c}, c: {b}}) == [[b, c]]


def test_the_rooms_can_be_printed(capsys):
    show()
    assert "runtime" in capsys.readouterr().out


def test_imports_point_downward():
    faults = {module: faults_of(module, source) for module, source in SOURCES.items()}
    assert {module: found for module, found in faults.items() if found} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data/reader.py", "import hfbatch.predict.plan"),
        ("data/reader.py", "from hfbatch.output import ledger"),
        ("data/formats/jsonl.py", "from hfbatch.data.reader import read_split"),
        ("spec/job.py", "def late():\n    from hfbatch.tasks.base import Task"),
        ("tasks/base.py", "from hfbatch.tasks.text.encoder import Encoder"),
        ("tasks/__init__.py", "HOMES = {'torch': 'hfbatch.runtime.worker:Worker'}"),
        ("train/data/rows.py", "from hfbatch.train.recipes.base import Recipe"),
        ("predict/plan.py", "import ray.data"),
        ("cli/doctor.py", "import torch"),
        ("data/reader.py", "from . import splits"),
        ("predict/plan.py", "from hfbatch import JobSpec"),
        ("predict/run.py", "from hfbatch.train.plan import make_finetune_plan"),
    ],
)
def test_an_import_that_points_upward_is_found(module, source):
    assert faults_of(Path(module), source)


def test_modules_say_what_they_are_and_fit_a_reader():
    assert [module for module, source in SOURCES.items() if not ast.get_docstring(ast.parse(source))] == []
    lines = {module: len(source.splitlines()) for module, source in SOURCES.items()}
    assert {module: number for module, number in lines.items() if number > MOST_LINES} == {}


def test_help_takes_little_more_than_what_typer_takes_for_any_help():
    """In seconds of the processor, since machines and their load differ: Typer and rich take two thirds of them."""
    bare = "import typer\nt = typer.Typer(add_completion=False, rich_markup_mode='rich')\nt.command()(lambda: None)\nt()"
    ours, typers = [Path(sys.executable).with_name("hfbatch")], [sys.executable, "-c", bare]
    pairs = [(_processor_seconds(ours), _processor_seconds(typers)) for _ in range(3)]
    assert min(own / least for own, least in pairs) < 1.75, f"--help and that of Typer took {pairs} s"


def _processor_seconds(command: list[str | Path]) -> float:
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage" in done.stdout
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


def test_help_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from hfbatch.cli.app import app\n"
        "try:\n    app(['--help'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
