"""What makes a job the one that it is, and whether an output may go on with it. Starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfbatch.compute.worker import Settled
from hfbatch.data import results_version
from hfbatch.data.filesystem import redact
from hfbatch.data.ledger import Ledger, State
from hfbatch.data.models import Model
from hfbatch.errors import SpecError
from hfbatch.spec import JobSpec
from hfbatch.tasks.base import Task


def job_identity(
    spec: JobSpec, model: Model, task: Task, inputs: dict[str, str], keep: list[str]
) -> dict[str, Any]:
    """What changes results. Workers, batch sizes and paths do not.

    :param inputs: task input to dataset column.
    :param keep: input columns copied to the output.
    """
    tokenizer = spec.tokenizer.model_dump(mode="json", exclude_defaults=True)
    files = spec.input.files.model_dump(mode="json", exclude_defaults=True, exclude={"timeout"})
    types = {"types": spec.input.types} if spec.input.types else {}
    flag = {"truncated": spec.output.truncated_column} if spec.output.truncated else {}
    return {
        "task": spec.task,
        "model": {"commit": model.commit, "dtype": spec.model.dtype},
        "engine": "torch",
        "params": task.params.model_dump(mode="json"),
        "batch": {"max_length": spec.batch.max_length},
        "input": {
            "columns": inputs,
            "filter": spec.input.filter,
            **types,
            **({"files": files} if files else {}),
        },
        "output": {"keep": keep, "prefix": spec.output.prefix, **flag},
        "seed": spec.seed,
        **({"tokenizer": tokenizer} if tokenizer else {}),
        results_version.KEY: results_version.RESULTS_VERSION,
    }


def earlier(
    ledger: Ledger, identity: dict[str, Any], spec: JobSpec, state: State
) -> tuple[dict[str, Any], Settled | None]:
    """The identity that the output has from now on, and choices of an earlier run.

    That of an earlier run stays where it is of another version of results alone and no work is left.

    :raises SpecError: if the output holds another job's parts, or work is left of one of another version.
    """
    job = ledger.read_job()
    if job is None:
        return identity, None
    there, shown = ledger.list_parts(), redact(spec.output.path)
    version = {results_version.KEY: results_version.version_of(job["identity"])}
    differing = list(_differences({**job["identity"], **version}, {**identity, **version}))
    if differing and there:
        raise SpecError(
            f"output {shown} holds the parts of another job; "
            f"it differs in {'; '.join(differing)}. Choose another output, or replace it with --overwrite"
        )
    fault = results_version.version_fault(shown, job)
    if fault and there and state.todo:
        raise SpecError(fault)
    if fault and there:
        identity = job["identity"]
    elif fault or differing:
        return identity, None
    if not job["settled"]:
        return identity, None
    settled = Settled(**job["settled"])
    size = settled.batch_size if spec.batch.size == "auto" else spec.batch.size
    return identity, Settled(size, settled.dtype, settled.device)


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where} (there: {old!r}, now: {new!r})"
