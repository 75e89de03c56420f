"""Measures the bare engine loop: the job's own model worker over the same splits in one process, without Ray.

Prints one JSON line: `device_s`, seconds of the loop over features that are ready (batching, model, results back
in input order), and `tokenise_s`, what preparing them took before. The ceiling of any job on this machine.

    python -m tests.benchmarks.bare FOLDER --batch 32
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from hfbatch.data.reader import read_split
from hfbatch.engines.precision import native_dtype
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.config import RuntimeChoice
from hfbatch.runtime.runner import Runner
from hfbatch.runtime.variants import Variant
from hfbatch.spec.job import JobSpec
from tests.benchmarks.tools import minilm

WARM_UP_ROWS = 256


def bare_loop(source: Path, batch: int, dtype: str = "auto") -> dict[str, float | int | str]:
    """Seconds of the loop and of tokenising, with all cores for each in turn.

    :param batch: rows of a batch.
    """
    with tempfile.TemporaryDirectory() as out:
        spec = JobSpec.build({"task": "embedding", "model": minilm(), "input": str(source), "output": out})
        plan = make_plan(spec)
    dtype = native_dtype()[1] if dtype == "auto" else dtype
    runner = Runner(plan.runner)
    engine = runner.load(Variant("torch", dtype))
    runner.apply(RuntimeChoice(batch, dtype, engine.device))
    tokenised, features = 0.0, []
    for split in plan.splits:
        rows = read_split(split, plan.read)
        columns = {name: rows.table[column].combine_chunks() for name, column in plan.inputs.items()}
        begun = time.perf_counter()
        features.append(runner.preprocess(columns, rows.places).features)
        tokenised += time.perf_counter() - begun
    runner.predict(features[0].slice(0, WARM_UP_ROWS))
    begun = time.perf_counter()
    rows_out = sum(len(runner.predict(table).outputs) for table in features)
    device = time.perf_counter() - begun
    return {
        "rows": rows_out,
        "device_s": device,
        "tokenise_s": tokenised,
        "dtype": engine.dtype,
        "batch": batch,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--dtype", default="auto")
    chosen = options.parse_args()
    print(json.dumps(bare_loop(chosen.folder, chosen.batch, chosen.dtype)))


if __name__ == "__main__":
    main()
