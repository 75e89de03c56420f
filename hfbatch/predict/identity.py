"""The identity of a job, and whether an existing output can be continued with it. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from hfbatch.data.filesystem import redact
from hfbatch.errors import SpecError
from hfbatch.hub.models import Model
from hfbatch.output import results_version
from hfbatch.output.identity import differences
from hfbatch.output.ledger import Ledger
from hfbatch.output.sink import State
from hfbatch.runtime.config import RuntimeChoice
from hfbatch.spec.engines import EngineSpec
from hfbatch.spec.job import JobSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task

NOT_IN_RESULTS = frozenset(
    (
        *("guard", "device_map", "memory", "seconds", "threads", "python", "timeout", "start_timeout"),
        *("token_env", "requests_per_minute", "texts_per_request", "prices"),
    )
)
"""What the engine's section of a spec says of checks, trials, places and requests, which change no results; nor do threads, by more than
rounding: those of `auto` are of the machine, and like `workers.cpus`, they belong to no job."""


def job_identity(
    spec: JobSpec, model: Model, task: Task, inputs: dict[str, str], keep: list[str]
) -> dict[str, Any]:
    """Returns the settings that change results. Workers, batch sizes and paths do not.

    :param inputs: task inputs mapped to dataset columns.
    :param keep: input columns copied to the output.
    """
    tokenizer = spec.tokenizer.model_dump(mode="json", exclude_defaults=True)
    files = spec.input.files.model_dump(mode="json", exclude_defaults=True, exclude={"timeout"})
    types = {"types": spec.input.types} if spec.input.types else {}
    flag = {"truncated": spec.output.truncated_column} if spec.output.truncated else {}
    return {
        "task": spec.task,
        "model": {"commit": model.version, "dtype": spec.model.dtype},
        "engine": _engine(spec.engine),
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
) -> tuple[dict[str, Any], RuntimeChoice | None]:
    """Returns the identity of the output from now on, and the runtime choice of an earlier run.

    The identity of an earlier run is kept, since its parts bear its fingerprint, if it means the same job, or if it
    differs only in the version of results and all splits are done.

    :raises SpecError: if the output holds parts of another job, or an unfinished job of another version of results.
    """
    job = ledger.read_job()
    if job is None:
        return identity, None
    there, shown = ledger.list_parts(), redact(spec.output.path)
    differing = differences(_effective(job, identity), identity)
    if differing and there:
        raise SpecError(
            f"output {shown} holds the parts of another job; "
            f"it differs in {'; '.join(differing.values())}. {_pin(job, spec, differing)}Choose another output, or "
            "replace it with --overwrite"
        )
    fault = results_version.version_fault(shown, job)
    if fault and there and state.todo:
        raise SpecError(fault)
    if differing or (fault and not there):
        return identity, None
    if there:
        identity = job["identity"]
    if not job["settled"]:
        return identity, None
    unknown = job["settled"].keys() - {one.name for one in fields(RuntimeChoice)}
    if unknown:
        raise SpecError(
            f"output {shown} was created by a newer hfbatch, which also chose {', '.join(sorted(unknown))}; "
            "use that version, choose another output, or replace it with --overwrite"
        )
    given: dict[str, Any] = {"engine": spec.engine.name, "quantization": spec.engine.quantization}
    if (compiled := getattr(spec.engine, "compile", "auto")) != "auto":
        given["compiled"] = compiled
    choice = RuntimeChoice(**{**job["settled"], **({} if spec.engine.name == "auto" else given)})
    if spec.engine.guard.mode == "required" and not _compared(choice):
        if there:
            raise SpecError(
                f"engine.guard required: the parts in output {shown} were computed in {choice.quantization} weights and "
                f"{choice.dtype} without a comparison with float32; leave it out, or replace them with --overwrite"
            )
        return identity, None
    size = choice.batch_size if spec.batch.size == "auto" else spec.batch.size
    return identity, replace(choice, batch_size=size)


def _pin(job: Mapping[str, Any], spec: JobSpec, differing: Mapping[str, str]) -> str:
    """Returns how to continue with the model of an earlier run; empty if it is not a model of the Hub, or not what differs."""
    if (
        "model.commit" not in differing
        or spec.model.revision
        or spec.engine.name == "http"
        or Path(spec.model.name).exists()
    ):
        return ""
    return f"The model has a new commit: set model.revision={job['model']['commit']} to continue with the earlier one. "


def _compared(choice: RuntimeChoice) -> bool:
    """Returns whether an earlier choice lowers nothing, or agreed with float32."""
    lowered = choice.dtype != "float32" or choice.quantization != "none"
    return not lowered or (choice.guard or {}).get("status") == "passed"


def _engine(spec: EngineSpec) -> dict[str, Any]:
    """Returns the part of the identity that the engine is; other options change no result."""
    unpacked = {"packing"} if getattr(spec, "packing", None) is False else set()  # as the default, auto
    return spec.model_dump(mode="json", exclude_defaults=True, exclude={*NOT_IN_RESULTS, *unpacked})


def _effective(job: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the identity of an earlier job as this version writes it.

    Older versions wrote the engine `torch` in the identity of every job; which one it was follows from the spec: its
    `engine` or, if an older version wrote it, `batch.continuous`. A dtype that `auto` chose is the same as its name, and so
    is what it chose to compile. A param that this version has added had its default.

    :param job: content of job.json.
    :param identity: of the job that is to continue it.
    """
    spec, old, settled = job["spec"], job["identity"], job["settled"] or {}
    alias = "continuous" if spec.get("batch", {}).get("continuous") else "torch"
    written = spec.get("engine") or {"name": alias}
    engine = old["engine"]
    if not isinstance(engine, dict):
        engine = _engine(TypeAdapter(EngineSpec).validate_python(written))
    model, asked = old.get("model", {}), identity["model"]["dtype"]
    if model.get("dtype") == "auto" and settled.get("dtype") == asked:
        model = {**model, "dtype": asked}
    asked = identity["engine"].get("compile")
    if "compile" not in engine and settled.get("compiled", False) == asked:
        engine = {**engine, "compile": asked}
    options = task_class(identity["task"]).Params.model_fields
    later = {
        name: to_jsonable_python(option.get_default(call_default_factory=True))
        for name, option in options.items()
        if name not in old["params"] and not option.is_required()
    }
    return {**old, "engine": engine, "model": model, "params": {**old["params"], **later}}
