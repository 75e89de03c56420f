"""Start-up: measures the seconds from the command to the first committed part of a small job, and names them.

A part counts when its file is there, seen from outside. The phases are those of report.json (`seconds.phases`);
`interpreter` is what passes before hfbatch looks at its clock for the first time.

    python -m tests.benchmarks.startup --rows 200 --rounds 3
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import tools
from tests.benchmarks.corpus import write_corpus

TARGET_S = 25.0
POLL_S = 0.02


def first_part(command: list[str], out: Path) -> tuple[float, float, dict[str, Any]]:
    """Runs a job. :returns: seconds to its first part, seconds to its exit, its report."""
    begun, seen = time.perf_counter(), None
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tools.ROOT, env=tools.ENV
    )
    while seen is None and job.poll() is None:
        time.sleep(POLL_S)
        seen = time.perf_counter() - begun if any(out.glob("part-*.parquet")) else None
    printed, wrong = job.communicate()
    total = time.perf_counter() - begun
    if job.returncode or seen is None:
        sys.exit(f"the job ended with {job.returncode}:\n{printed}\n{wrong}")
    return seen, total, json.loads(tools.last_object(printed))


def main() -> None:
    parser = tools.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=tools.minilm(), help="default: all-MiniLM-L6-v2")
    options = parser.parse_args()
    runs = []
    with tools.workspace() as folder:
        source = write_corpus(folder / "texts", options.rows, shards=1)
        for number in range(options.rounds):
            out = folder / f"out-{number}"
            runs.append(first_part(tools.embed_command(source, out, options.model), out))
    seconds = [describe(*run) for run in runs]
    columns = ["", *(f"round {number + 1}" for number in range(len(runs))), "median"]
    tools.show(
        f"{options.rows:,} rows, seconds",
        columns,
        [
            [name, *(f"{one.get(name, 0.0):.2f}" for one in seconds), f"{_median(seconds, name):.2f}"]
            for name in seconds[0]
        ],
    )
    first = _median(seconds, "first part")
    print(f"from command to first part: {first:.1f} s, target under {TARGET_S:g} s: ", end="")
    print("met" if first < TARGET_S else "not met")
    tools.save(options.json, {"rows": options.rows, "runs": seconds, "first_part_s": first})


def describe(first: float, total: float, report: dict[str, Any]) -> dict[str, float]:
    """The seconds of a run by name: the phases in order, then the sums."""
    reported = report["seconds"]
    phases = dict(reported["phases"])
    working = phases.pop("working", 0.0)
    interpreter = max(first - reported["first_part"], 0.0)
    to_part = max(reported["first_part"] - sum(phases.values()), 0.0)
    sums = {"first part": first, "work, all of it": working, "the whole command": total}
    return {"interpreter": interpreter, **phases, "first split, to its commit": to_part, **sums}


def _median(seconds: list[dict[str, float]], name: str) -> float:
    return median(one.get(name, 0.0) for one in seconds)


if __name__ == "__main__":
    main()
