"""Memory: measures whether the driver and the model worker stay flat from few rows to many.

What is measured is hfbatch itself, not a model: a tiny random encoder over short texts, in splits of the same size,
so that 300,000 rows take minutes and not hours. Resident memory (RSS) of the hfbatch process and of the actor that
runs ForwardStage, every half second; the figure is the peak of the whole run. `private` is RSS without shared pages:
without Ray's object store, which maps more of its fixed pool the longer a process lives.

    python -m tests.benchmarks.memory --rows 10000 300000
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks import tools
from tests.models.text import CORPUS, tiny_bert_encoder

MOST_GROWTH = 1.10
SPLIT_ROWS = 1000
SHARD_ROWS = 25_000
SECONDS_BETWEEN = 0.5
KINDS = ("driver", "driver private", "actor", "actor private")
MIB = 1 << 20


def write_short_texts(folder: Path, rows: int) -> Path:
    """Shards of one sentence a row."""
    folder.mkdir(parents=True)
    for start in range(0, rows, SHARD_ROWS):
        ids = np.arange(start, min(start + SHARD_ROWS, rows))
        texts = pa.array(CORPUS).take(pa.array(ids % len(CORPUS)))
        pq.write_table(
            pa.table({"id": ids, "text": texts}),
            folder / f"shard-{start:08d}.parquet",
            row_group_size=SPLIT_ROWS,
        )
    return folder


def watch(command: list[str]) -> dict[str, list[int]]:
    """Runs a job. :returns: bytes of each of KINDS, sample by sample."""
    samples: dict[str, list[int]] = defaultdict(list)
    with TemporaryFile("w+") as printed:
        job = subprocess.Popen(
            command, stdout=printed, stderr=subprocess.STDOUT, cwd=tools.ROOT, env=tools.ENV
        )
        driver = psutil.Process(job.pid)
        while job.poll() is None:
            for kind, process in [("driver", driver), *(("actor", one) for one in actors(driver))]:
                add_sample(samples, kind, process)
            time.sleep(SECONDS_BETWEEN)
        if job.returncode:
            printed.seek(0)
            sys.exit(f"the job ended with {job.returncode}:\n{printed.read()[-4000:]}")
    return samples


def actors(driver: psutil.Process) -> list[psutil.Process]:
    """Processes below the driver that run the forward stage; Ray writes its name into their command line."""
    found = []
    for process in driver.children(recursive=True):
        try:
            if "ForwardStage" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it has ended since the listing
    return found


def add_sample(samples: dict[str, list[int]], kind: str, process: psutil.Process) -> None:
    try:
        memory = process.memory_info()
    except psutil.Error:
        return  # it has ended since the listing
    samples[kind].append(memory.rss)
    samples[f"{kind} private"].append(memory.rss - memory.shared)


def measure(folder: Path, rows: int, model: str) -> dict[str, float]:
    """MiB at the peak of each of KINDS, and how many samples there were."""
    source = write_short_texts(folder / f"texts-{rows}", rows)
    sets = (f"input.split_rows={SPLIT_ROWS}", "batch.size=32", "model.dtype=float32", "workers.count=1")
    samples = watch(tools.embed_command(source, folder / f"out-{rows}", model, *sets))
    if not samples["actor"]:
        sys.exit("no process with ForwardStage in its command line was seen")
    return {kind: max(samples[kind]) / MIB for kind in KINDS} | {"samples": len(samples["actor"])}


def main() -> None:
    parser = tools.arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs=2, default=[10_000, 300_000], metavar=("FEW", "MANY"))
    options = parser.parse_args()
    few, many = options.rows
    with tools.workspace() as folder:
        model = tiny_bert_encoder(folder / "model")
        at = {rows: measure(folder, rows, model) for rows in (few, many)}
    growth = {kind: at[many][kind] / at[few][kind] for kind in KINDS}
    tools.show(
        f"peak MiB, target: grows at most {MOST_GROWTH - 1:.0%}",
        ["", f"{few:,} rows", f"{many:,} rows", "ratio", ""],
        [
            [
                kind,
                f"{at[few][kind]:,.0f}",
                f"{at[many][kind]:,.0f}",
                f"{growth[kind]:.3f}",
                tools.verdict(growth[kind] <= MOST_GROWTH),
            ]
            for kind in KINDS
        ],
    )
    print(f"samples of the actor: {at[few]['samples']:.0f} and {at[many]['samples']:.0f}")
    tools.save(options.json, {"rows": options.rows, "mib": at, "growth": growth})


if __name__ == "__main__":
    main()
