"""Resolves the task of a job by name or from the model, and checks it against the model. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from pydantic import ValidationError

from hfbatch.data.filesystem import one_line
from hfbatch.engines import ENGINES, EngineKind, kind_of
from hfbatch.engines.base import PACKED, Capability, Engine, RowEngine
from hfbatch.engines.compilers import INSTALL, missing_to_compile
from hfbatch.engines.gguf import as_folder
from hfbatch.engines.quantization import settings_faults
from hfbatch.errors import HfbatchError, SpecError
from hfbatch.hub.graphs import graph_alone_fault
from hfbatch.hub.models import Model
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.guard import is_limited, limit_faults
from hfbatch.runtime.variants import is_quantised
from hfbatch.spec.engines import EngineSpec
from hfbatch.spec.faults import faults_of
from hfbatch.spec.job import JobSpec
from hfbatch.spec.prompts import RENDERING
from hfbatch.tasks import endpoint_task, named, task_class
from hfbatch.tasks.base import Task
from hfbatch.tasks.completing import CompletingTask
from hfbatch.tasks.label_maps import label_faults, label_notes
from hfbatch.tasks.model_support import infer, misfits


def readable(model: Model) -> Model:
    """Returns a pinned model with the files that the plan reads; those of a GGUF file are written first.

    :raises SpecError: for a GGUF file that transformers does not read.
    """
    with model_faults(model.name):
        return as_folder(model, weights=False)


def name_task(spec: JobSpec, model: Model | None, notes: list[str]) -> JobSpec:
    """Returns the spec with the task's canonical name, inferred or resolved from an alias, and its implied params.

    Files that params name are read here.
    """
    name = spec.task
    if not kind_of(spec.engine.name).local:
        if name == "auto":
            raise SpecError(
                "task auto reads the model's files, which an endpoint has; name the task, such as text-generation"
            )
        name = endpoint_task(name)
    elif name == "auto":
        if model is None:
            raise SpecError([])  # the error in the model is reported already
        with model_faults(spec.model.name):
            name, source = infer(model)
        notes.append(f"task {name}, inferred from {source}")
    cls, params = named(name)
    return spec.model_copy(update={"task": cls.name, "params": cls.read_files({**params, **spec.params})})


def check_task(
    spec: JobSpec, model: Model | None, root: str, faults: list[str], notes: list[str]
) -> Task | None:
    """Builds the task and checks it; if params are invalid, reports them and checks the rest with the defaults of all but
    those that render the input.

    :param root: folder or URL that paths in the rows are relative to.
    """
    cls = task_class(spec.task)
    try:
        cls.Params.model_validate(spec.params)
    except ValidationError as error:
        faults += faults_of(error, cls.Params, "params")
        wrong = {fault["loc"][0] for fault in error.errors(include_url=False) if fault["loc"]}
        rendering = {name: spec.params[name] for name in {*RENDERING} & {*spec.params} - wrong}
        spec = spec.model_copy(update={"params": rendering})
        if any(option.is_required() for option in cls.Params.model_fields.values()):
            return None
    if model is None:
        return None
    with model_faults(spec.model.name):
        task = RunnerConfig.of(spec, model, root).build_task()
        known = Capability.ANSWER not in task.asks  # of the model of an endpoint, only the name is
        faults += (known and (misfits(task) or label_faults(task))) or task.check()
        faults += engine_faults(spec.engine, spec.model.dtype, task, spec.workers.gpus)
        faults += _thread_faults(spec)
        if not faults and "text" in task.takes:
            notes += _embedding_notes(task)
        notes += label_notes(task)
        if task.vocabulary is not None:
            notes.append(
                f"tokens added to the tokenizer: {task.added_tokens}; their embeddings are untrained, "
                "initialised near the mean of the others"
            )
    return task


def task_with(task: Task, config: RunnerConfig) -> Task:
    """Returns a task with other params, and what it has loaded that does not depend on them.

    :param config: with the params.
    :raises SpecError: with every fault of the params.
    """
    try:
        params = type(task).Params.model_validate(config.params)
    except ValidationError as error:
        raise SpecError(faults_of(error, type(task).Params, "params")) from error
    made = task.changed(params=params)
    if faults := made.check() + engine_faults(config.engine, config.dtype, made):
        raise SpecError(faults)
    return made


def engine_faults(spec: EngineSpec, dtype: str, task: Task, gpus: float | str = "auto") -> list[str]:
    """Returns errors if the engine is not installed, does not answer what the task asks, does not compute in the dtype or on
    GPUs, or does not support the task's options.

    :param dtype: of the spec.
    :param gpus: of one worker, of the spec.
    """
    name, kind = spec.name, kind_of(spec.name)
    if task.model.graphs and (faults := _graph_faults(spec, task)):
        return faults
    lacking = [need for need in Capability if need in task.asks - kind.answers]
    if lacking:
        able = [other for other, one in ENGINES.items() if task.asks <= one.answers]
        needs = " and ".join(need.value for need in lacking)
        return [
            f"engine {name} cannot run task {task.name}, which needs {needs}; use engine {' or '.join(able)}"
        ]
    faults = _missing_packages(spec, kind) + limit_faults(task, spec.guard) + _guard_faults(spec, task)
    quantised = getattr(task.config, "quantization_config", None)
    if isinstance(quantised, dict) and not task.model.trust_remote_code and not kind.apart:
        faults += settings_faults(task.model.name, quantised)
    if dtype not in ("auto", *kind.dtypes):
        faults.append(
            f"engine {name} does not compute in {dtype}; set model.dtype to {' or '.join(kind.dtypes)}"
        )
    if not kind.gpus and gpus not in ("auto", 0):
        faults.append(f"engine {name} computes on CPUs; leave workers.gpus out, or use engine torch")
    if faults or not kind.local:
        return faults
    if getattr(spec, "device_map", None):
        faults += _spread_faults(task)
    if getattr(spec, "compile", False) is True:
        faults += _compile_faults(task)
    if getattr(spec, "packing", False) is True:
        faults += packing_faults(task)
    if spec.quantization != "none":
        faults += _quantization_faults(spec, task)
    if task.model.adapter:
        faults += kind.load().adapter_faults(task.model.name, task.model.adapter)
    if kind.rows:
        engine: type[RowEngine] = kind.load()
        asking = cast(CompletingTask, task)
        faults += engine.option_faults(task.config, asking.decoding, task.params.begin_with)
        if getattr(task, "count", 1) > 1:
            faults.append(
                f"engine {name} gives one text for each prompt; leave params.num_return_sequences out, or use engine torch"
            )
        if kind.apart and task.vocabulary is not None:
            faults.append(f"tokenizer: engine {name} adds no tokens to a model; leave the added tokens out")
    return faults


def _missing_packages(spec: EngineSpec, kind: EngineKind) -> list[str]:
    """Returns an error if the engine, or its quantisation, needs a package that is not installed."""
    if missing := kind.missing():
        return [f"engine {spec.name} needs {' and '.join(missing)}; pip install 'hfbatch[{spec.name}]'"]
    if missing := kind.missing(spec.quantization):
        return [
            f"engine.quantization {spec.quantization} of engine {spec.name} needs {' and '.join(missing)}; "
            "pip install 'hfbatch[quantization]'"
        ]
    return []


def _guard_faults(spec: EngineSpec, task: Task) -> list[str]:
    """Returns errors if a required comparison with float32 cannot be made, or could not fail."""
    if spec.guard.mode != "required":
        return []
    faults = []
    if task.agreement is None:
        faults.append(
            f"engine.guard required: task {task.name} has no measure of agreement with float32; leave it out"
        )
    elif not spec.guard.limits and not is_limited(task):
        faults.append(
            f"engine.guard required: task {task.name} has no limit of its own; set one of engine.guard.limits, or leave it out"
        )
    if is_quantised(task):
        faults.append(
            f"engine.guard required: the weights of model {task.model.name!r} are quantised already, so that there is nothing "
            "to compare them with; give the model in full precision, or leave it out"
        )
    return faults


def _graph_faults(spec: EngineSpec, task: Task) -> list[str]:
    """Returns errors for a model that is a graph, which the engine does not run, or not as the spec asks for it."""
    graphs, model = task.model.graphs, f"model {task.model.name!r}"
    needs = [need.value for need in Capability if need in task.asks - {Capability.FORWARD}]
    if needs:
        return [
            f"task {task.name} needs {' and '.join(needs)}, and {model} is a graph ({', '.join(graphs.values())}); give "
            "its safetensors weights"
        ]
    if spec.name not in graphs:
        return [f"engine {spec.name}: {graph_alone_fault(task.model.name, graphs)}"]
    faults = []
    if spec.quantization != "none":
        faults.append(
            f"engine.quantization {spec.quantization}: {model} is a graph, which runs as it is; leave engine.quantization out"
        )
    if spec.guard.mode == "required":
        faults.append(
            f"engine.guard required: {model} is a graph, and there are no weights to compare it with; leave it out"
        )
    if task.vocabulary is not None:
        faults.append(f"tokenizer: {model} is a graph, which gets no more tokens; leave the added tokens out")
    return faults


def _spread_faults(task: Task) -> list[str]:
    """Returns errors for tasks and models that cannot be spread over several devices."""
    faults = []
    if Capability.MODULE in task.asks:
        faults.append(
            f"engine.device_map: task {task.name} needs {Capability.MODULE.value} on one device; leave it out"
        )
    if task.vocabulary is not None:
        faults.append("engine.device_map: tokens cannot be added to a model on several devices; leave it out")
    if getattr(task.config, "quantization_config", None) is not None:
        faults.append(
            f"engine.device_map: the weights of model {task.model.name!r} are quantised; leave it out"
        )
    return faults


def packing_faults(task: Task) -> list[str]:
    """Returns an error for tasks and models whose batches cannot be packed."""
    shown = f"engine.packing: task {task.name}"
    if needs := [need.value for need in Capability if need in task.asks - {Capability.FORWARD}]:
        return [f"{shown} needs {' and '.join(needs)}, which packed batches do not have; leave it out"]
    if task.reads_masked:
        return [
            f"{shown} reads tokens that its attention mask hides, and packed batches hold none; leave it out"
        ]
    kind = task.config.model_type
    own = getattr(task.config, "auto_map", None) and task.model.trust_remote_code
    if kind in PACKED and not own:
        return []
    why = "has code of its own" if own else f"is of type {kind!r}"
    return [
        f"engine.packing: model {task.model.name!r} {why}, and packed batches are for {', '.join(sorted(PACKED))}; leave it out"
    ]


def _compile_faults(task: Task) -> list[str]:
    """Returns errors for tasks and models that are not compiled, and for a machine without a compiler."""
    faults = []
    if needs := [need.value for need in Capability if need in task.asks - {Capability.FORWARD}]:
        faults.append(
            f"engine.compile: task {task.name} needs {' and '.join(needs)}, and only the outputs of a model are compiled; "
            "leave it out"
        )
    if is_quantised(task):
        faults.append(f"engine.compile: the weights of model {task.model.name!r} are quantised; leave it out")
    if missing := missing_to_compile():
        faults.append(
            f"engine.compile needs {' and '.join(missing)} on every node; install them ({INSTALL}), or leave it out"
        )
    return faults


def _thread_faults(spec: JobSpec) -> list[str]:
    """Returns an error for more threads than the spec gives CPUs to a worker."""
    threads, cpus = spec.engine.threads, spec.workers.cpus
    if threads == "auto" or cpus == "auto" or threads <= max(round(cpus), 1):
        return []
    return [
        f"engine.threads is {threads}, and workers.cpus {cpus:g}; set engine.threads={max(round(cpus), 1)} or fewer, or "
        f"workers.cpus={threads}"
    ]


def _quantization_faults(spec: EngineSpec, task: Task) -> list[str]:
    """Returns errors for weights that are quantised already, and for models that the engine cannot quantise."""
    given = getattr(task.config, "quantization_config", None)
    if given is not None:
        method = given.get("quant_method") if isinstance(given, dict) else given.quant_method
        method = getattr(method, "value", method)
        return [
            f"engine.quantization {spec.quantization}: the weights of model {task.model.name!r} are quantised already, by "
            f"{method}; leave engine.quantization out"
        ]
    engine: type[Engine] = ENGINES[spec.name].load()
    remote = task.model.trust_remote_code
    return engine.quantization_faults(task.config, task.auto_class, remote, spec.quantization)


def _embedding_notes(task: Task) -> list[str]:
    """Returns a note on tokens without an embedding in the model. One used only for padding does no harm."""
    tokens = {
        number: token for number, token in task.not_embedded.items() if token != task.tokenizer.pad_token
    }
    if not tokens:
        return []
    shown = ", ".join(f"{token!r} ({number})" for number, token in sorted(tokens.items())[:3])
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    return [
        f"the tokenizer has tokens beyond the {task.embedded} that model {task.model.name!r} has embeddings for: {shown}{more}; "
        "a row with one of them is rejected"
    ]


@contextmanager
def model_faults(name: str) -> Iterator[None]:
    """Converts errors of transformers over a model's files. :raises SpecError: with the model's name."""
    try:
        yield
    except HfbatchError:
        raise
    except Exception as error:  # configs, tokenizers and processors raise errors of any class
        if "trust_remote_code" in str(error):
            cause = (
                "it comes with Python code of its own; read that code, then set model.trust_remote_code=true"
            )
        else:
            known = isinstance(error, OSError | ValueError | ImportError)
            cause = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        raise SpecError(f"model {name!r} cannot be used: {cause}") from error
