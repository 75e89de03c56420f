"""What job tests share: inputs, specs, and reading outputs. Knows nothing of how jobs run."""

from __future__ import annotations

import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from click.testing import Result
from typer.testing import CliRunner

from hfbatch import JobSpec
from hfbatch.cli.app import app
from hfbatch.output.layout import REJECTS
from hfbatch.spec.finetune import FinetuneSpec
from tests import programs
from tests.models.text import CORPUS
from tests.programs import Program

HFBATCH = [sys.executable, "-m", "hfbatch"]


def sentences(count: int, seed: int = 0, most: int = 12) -> list[str]:
    """Texts of one to `most` sentences."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(CORPUS, k=chosen.randint(1, most))) for _ in range(count)]


def write_shards(folder: Path, texts: list[str | None], shards: int = 3, first_id: int = 0) -> Path:
    """Texts with an `id` as Parquet shards. :returns: the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = range(first_id, first_id + len(texts))
    table = pa.table({"id": pa.array(ids, pa.int64()), "text": pa.array(texts, pa.string())})
    step = max(-(-len(texts) // shards), 1)
    for k in range(shards):
        pq.write_table(table.slice(k * step, step), folder / f"shard-{first_id:05d}-{k:03d}.parquet")
    return folder


def make_spec(task: str, name: str, source: Path | str, out: Path | str, **sections: Any) -> JobSpec:
    """A spec in float32 with small batches, so that tests compare and do not probe; with one worker, which starts fast."""
    sections = {"batch": {"size": 8}, "workers": {"count": 1}, **sections}
    named = {"name": name, "dtype": "float32", **sections.pop("model", {})}
    source = {"path": str(source), **sections.pop("input", {})}
    output = {"path": str(out), **sections.pop("output", {})}
    return JobSpec.build({"task": task, "model": named, "input": source, "output": output, **sections})


def read_output(out: Path | str) -> pa.Table:
    """All parts, ordered by id, as any reader sees them."""
    return ds.dataset(str(out), format="parquet").to_table().sort_by("id").combine_chunks()


def read_rejects(out: Path | str) -> list[dict[str, Any]]:
    """All rejects, ordered by id."""
    files = sorted(Path(out, REJECTS).iterdir())
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: row["id"])


def part_names(out: Path | str) -> list[str]:
    """Names of the committed parts; none where the folder is made, or removed, meanwhile."""
    try:
        return sorted(path.name for path in Path(out).glob("part-*.parquet"))
    except FileNotFoundError:
        return []


def part_stamps(out: Path | str) -> dict[str, tuple[int, int]]:
    """Inode and modification time of each part: a part that was written again has others."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(out).glob("part-*.parquet")
    }


def call(*arguments: str, **env: str) -> Result:
    """A command as a user types it, in this process: starting one takes longer than most commands do."""
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "HF_TOKEN": "hf_verysecret", **env})


def processes_of(started_by: int, name: str) -> list[psutil.Process]:
    """The processes that a process and those of its clusters have started, whose program has a name in it."""
    found = []
    for process in psutil.Process(started_by).children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if name in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found


def start_job(spec: JobSpec | FinetuneSpec, folder: Path, address: str) -> Program:
    """`hfbatch run` as a process of its own."""
    path = folder / "spec.yaml"
    path.write_text(spec.to_yaml(secrets=True), encoding="utf8")
    return Program(programs.hfbatch, "run", str(path), "--address", address)
