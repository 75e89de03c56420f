"""Reads the status of a fine-tuning from its output folder, without rows and without a cluster."""

from __future__ import annotations

import json
from typing import Any

from hfbatch.data.filesystem import READ_ERRORS, Location, join, kind_of, open_filesystem, redact
from hfbatch.errors import SpecError
from hfbatch.output.jobfile import require_job
from hfbatch.output.layout import CHECKPOINTS, SUCCESS, before
from hfbatch.output.lock import describe_holder
from hfbatch.train.loop.checkpoints import Checkpoints


def read_training(out: str) -> dict[str, Any]:
    """Reads the progress of a training from its newest checkpoint, or from its metrics once it is finished.

    :returns: `task`, `method`, `model`, `success`, `running` (who trains now, or None), `step` saved last and `steps`
        in all (None if unknown), `best` (the best evaluation so far, None before the first checkpoint).
    """
    job = require_job(out)
    metrics = _read(out, "metrics.json") if _done(out) else None
    state = {} if metrics else _newest_state(out)
    return {
        "output": Location(out),
        "task": job["spec"]["task"],
        "method": job["spec"]["method"]["name"],
        "model": job["spec"]["model"]["name"],
        "fingerprint": job["fingerprint"],
        "success": metrics is not None,
        "running": describe_holder(*open_filesystem(out)),
        "step": metrics["evaluations"][-1]["step"] if metrics else state.get("global_step"),
        "steps": metrics["evaluations"][-1]["step"] if metrics else state.get("max_steps"),
        "best": metrics["best"] if metrics else _best(state),
    }


def read_metrics(out: str) -> dict[str, Any]:
    """Reads metrics.json of a finished training. :raises SpecError: if it has not finished."""
    metrics = _read(out, "metrics.json") if _done(out) else None
    if metrics is None:
        raise SpecError(
            f"{redact(out)} has no metrics yet: its training has not finished; see `hfbatch status {redact(out)}`"
        )
    return metrics


def _done(out: str) -> bool:
    fs, path = open_filesystem(join(out, SUCCESS))
    return kind_of(fs, path) == "file"


def _newest_state(out: str) -> dict[str, Any]:
    """Reads the trainer's state in the newest checkpoint; returns only the step if there is none."""
    for folder in (CHECKPOINTS, before(CHECKPOINTS)):
        checkpoints = Checkpoints(join(out, folder))
        if steps := checkpoints.steps():
            name = checkpoints.path(steps[-1]).rpartition("/")[2]
            return _read(out, f"{folder}/{name}/trainer_state.json") or {"global_step": steps[-1]}
    return {}


def _best(state: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the evaluation of the best step so far."""
    for entry in state.get("log_history", ()):
        if entry["step"] == state.get("best_global_step") and "eval_loss" in entry:
            figures = {name[5:]: value for name, value in entry.items() if name.startswith("eval_")}
            return {"step": entry["step"], **figures}
    return None


def _read(out: str, name: str) -> dict[str, Any] | None:
    fs, path = open_filesystem(join(out, name))
    try:
        with fs.open_input_stream(path) as stream:
            return json.loads(stream.read())
    except READ_ERRORS:
        return None
