"""Planning and resuming: measures both with 100,000 splits of which all but one are done.

1,000 files of 100 row groups, a split each; parts with real footers, as an earlier run leaves them. Times
`make_plan` alone in a fresh process, then the whole `hfbatch` command that computes the one split left, verifies and
reports: once with the cache of manifests that an ended run leaves, once without it, as after a SIGKILL.

    python -m tests.benchmarks.planning
    python -m tests.benchmarks.planning --files 20        # a small trial
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.data.splits import Split
from hfbatch.output.layout import MANIFESTS
from hfbatch.output.manifest import LENGTH_EDGES, Manifest
from hfbatch.output.writer import FOOTER_KEY, part_table_bytes
from hfbatch.predict.plan import Plan, make_plan
from hfbatch.runtime.config import RuntimeChoice
from hfbatch.spec.job import JobSpec
from tests.benchmarks import tools
from tests.models.text import CORPUS, tiny_bert_encoder

TARGET_S = 20.0
GROUPS = 100
GROUP_ROWS = 2
TIMED_PLAN = """
import sys, time
begun = time.perf_counter()
from hfbatch.predict.plan import make_plan
from hfbatch.spec.job import JobSpec
imported = time.perf_counter()
plan = make_plan(JobSpec.load(sys.argv[1]))
made = time.perf_counter()
import json
print(json.dumps({"import_s": imported - begun, "plan_s": made - imported, "todo": len(plan.todo)}))
"""


def write_input(folder: Path, files: int) -> Path:
    """Equal files under different names."""
    folder.mkdir(parents=True)
    rows = GROUPS * GROUP_ROWS
    texts = pa.array(CORPUS).take(pa.array(np.arange(rows) % len(CORPUS)))
    first = folder / "shard-00000.parquet"
    pq.write_table(pa.table({"id": np.arange(rows), "text": texts}), first, row_group_size=GROUP_ROWS)
    for number in range(1, files):
        shutil.copyfile(first, folder / f"shard-{number:05d}.parquet")
    return folder


def make_spec(folder: Path, files: int) -> JobSpec:
    return JobSpec.build(
        {
            "task": "embedding",
            "model": {"name": tiny_bert_encoder(folder / "model"), "dtype": "float32"},
            "input": {"path": str(write_input(folder / "texts", files)), "split_rows": GROUP_ROWS},
            "output": str(folder / "out"),
            "batch": {"size": 8},
        }
    )


def commit_all_but_one(plan: Plan) -> Split:
    """Writes what an earlier run would have; returns the split that is left, from the middle.

    Past PartWriter, which waits for the disk at every part: 100,000 waits would measure the disk.
    """
    job = plan.job() | {"settled": vars(RuntimeChoice(8, "float32", "cpu"))}
    plan.ledger.write_job(job)
    left = plan.splits[len(plan.splits) // 2]
    table = part_table(plan.schema)
    manifests = [manifest_of(split) for split in plan.splits if split is not left]
    stamp = {"fingerprint": plan.fingerprint, "commit": plan.model.commit}
    splits = (split for split in plan.splits if split is not left)
    for split, manifest in zip(splits, manifests, strict=True):
        footer = json.dumps({**stamp, "split": split.to_dict(), "manifest": vars(manifest)})
        Path(plan.ledger.root, split.part).write_bytes(part_table_bytes(table, {FOOTER_KEY: footer}))
    plan.sink.save_manifests(manifests)
    return left


def part_table(schema: pa.Schema) -> pa.Table:
    """A part's rows; the same in each, since nobody reads them here."""
    columns = {"id": pa.array(np.arange(GROUP_ROWS)), "text": pa.array(CORPUS[:GROUP_ROWS])}
    kind = schema.field("embedding").type
    vectors = np.zeros((GROUP_ROWS, kind.list_size), np.float32)
    vectors[:, 0] = 1
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), kind.list_size)
    return pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


def manifest_of(split: Split) -> Manifest:
    now = time.time()
    stages = ("read", "preprocess", "forward", "postprocess", "write")
    return Manifest(
        split.part,
        rows_read=split.rows,
        rows_in=split.rows,
        rows_out=split.rows,
        tokens=12 * split.rows,
        padded_tokens=12 * split.rows,
        batches=1,
        seconds=dict.fromkeys(stages, 0.0123456789),
        lengths=np.histogram([12] * split.rows, bins=LENGTH_EDGES)[0].tolist(),
        histogram=[0] * 20,
        worker="host cpu (some processor)",
        started=now - 1,
        finished=now,
    )


def timed_plan(spec: Path) -> dict[str, float]:
    """Seconds of imports and of make_plan in a fresh process."""
    return tools.run([sys.executable, "-c", TIMED_PLAN, spec]).answer


def timed_resume(spec: Path) -> dict[str, Any]:
    """Seconds of the whole command that computes the split that is left."""
    begun = time.perf_counter()
    done = subprocess.run(
        [*tools.HFBATCH, "run", str(spec), *tools.OPTIONS],
        capture_output=True,
        text=True,
        cwd=tools.ROOT,
        env=tools.ENV,
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"the job ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    report = json.loads(tools.last_object(done.stdout))
    if report["splits"]["this_run"] != 1 or report["splits"]["left"]:
        sys.exit(f"the job should have done one split and left none: {report['splits']}")
    phases, total = report["seconds"]["phases"], report["seconds"]["total"]
    return {"command_s": seconds, **phases, "verify, report": total - sum(phases.values())}


def variants(out: Path, left: Split, spec: Path) -> dict[str, dict[str, Any]]:
    """Plan and resume with and without the cache of manifests."""

    def without_cache() -> None:
        (out / MANIFESTS).unlink()

    steps: list[tuple[str, Callable[[], None]]] = [
        ("with the cache", lambda: None),
        ("without", without_cache),
    ]
    found = {}
    for name, prepare in steps:
        (out / left.part).unlink(missing_ok=True)
        prepare()
        found[name] = {**timed_plan(spec), **timed_resume(spec)}
    return found


def main() -> None:
    parser = tools.arguments(__doc__)
    parser.add_argument("--files", type=int, default=1000, help="files of 100 splits each")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    with tools.workspace(options.folder) as folder:
        spec = make_spec(folder, options.files)
        path = folder / "spec.yaml"
        path.write_text(spec.to_yaml(), encoding="utf8")
        fresh = timed_plan(path)
        plan = make_plan(spec)
        begun = time.perf_counter()
        left = commit_all_but_one(plan)
        print(f"{len(plan.splits):,} splits prepared in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        found = {"nothing done": fresh, **variants(folder / "out", left, path)}
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    rows = [[name, *(_cell(times.get(name)) for times in found.values())] for name in names]
    over = [_cell_verdict(times.get("command_s", times["plan_s"])) for times in found.values()]
    tools.show(
        f"{len(plan.splits):,} splits, seconds; target: command under {TARGET_S:g} s",
        ["", *found],
        [*rows, ["target", *over]],
    )
    tools.save(options.json, {"splits": len(plan.splits), "target_s": TARGET_S, **found})


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _cell_verdict(seconds: float) -> str:
    return tools.verdict(seconds < TARGET_S)


if __name__ == "__main__":
    main()
