"""The trial before a job takes rows from where there are any."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfbatch.cluster.trial import _try
from hfbatch.errors import WorkerError
from hfbatch.predict.plan import make_plan
from tests.jobs.tools import make_spec, sentences, write_shards


def tried(folder: Path, encoder: str, condition: str) -> int:
    """Rows of the trial, of three splits of ten rows."""
    write_shards(folder / "in", sentences(30, most=1))
    source = {"split_rows": 10, "filter": condition}
    plan = make_plan(make_spec("embedding", encoder, folder / "in", folder / "out", input=source))
    splits = [split.to_dict() for split in plan.todo]
    return _try(plan.stage_job(), splits, 1)["rows"]


@pytest.mark.usefixtures("ray_cluster")
def test_splits_without_rows_are_passed_over(tmp_path: Path, encoder: str) -> None:
    assert tried(tmp_path, encoder, "id >= 15") == 5
    with pytest.raises(WorkerError, match="none of the first 3 splits has a usable row"):
        tried(tmp_path, encoder, "id > 99")
