"""The plan of a fine-tuning: resolves the spec and reports all faults together. Does not start Ray or write output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from hfbatch._version import __version__
from hfbatch.data.filesystem import absolute, join, kind_of, lies_in, one_line, real_path
from hfbatch.data.formats.columns import storage_type
from hfbatch.data.listing import reads
from hfbatch.data.media_files import RowFiles, with_absolute_paths
from hfbatch.data.reader import ReadPlan, filter_columns, filter_faults
from hfbatch.data.source import Source, open_source
from hfbatch.errors import SpecError, SplitError
from hfbatch.hub.models import Model, pin
from hfbatch.output.identity import digest
from hfbatch.output.jobfile import is_training
from hfbatch.output.layout import JOB, SUCCESS
from hfbatch.output.ledger import Ledger
from hfbatch.output.lock import guard_note
from hfbatch.predict.bind import bind_columns, gather, left_out_notes
from hfbatch.predict.plan import versions
from hfbatch.runtime.checks import model_faults
from hfbatch.spec.faults import faults_of
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.spec.job import InputSpec
from hfbatch.tasks import named
from hfbatch.train.features import Part
from hfbatch.train.hub import hub_faults
from hfbatch.train.identity import is_finished, training_identity
from hfbatch.train.loop.adapters import method_faults
from hfbatch.train.loop.model import override_faults
from hfbatch.train.loop.trackers import reporting_faults
from hfbatch.train.loop.worker_config import build_recipe
from hfbatch.train.recipes import recipe_class
from hfbatch.train.recipes.base import Recipe

TRAINING = (
    "datasets",
    "peft",
    "sentence_transformers",
    "sklearn",
    "scipy",
    "rouge_score",
    "sacrebleu",
    "jiwer",
)
"""Modules of the extra `train`; any training may need them."""
OURS = (SUCCESS, "metrics.json", "report.html", "model", "adapter", "tensorboard")
"""What a training writes to its output besides the inner folder, in the order in which it is deleted."""


@dataclass
class FinetunePlan:
    """A fine-tuning that is ready to start, except that its rows are not validated yet."""

    spec: FinetuneSpec
    model: Model
    recipe: Recipe
    train: Part
    eval: Part
    types: dict[str, pa.DataType]
    """Types of the recipe's columns in the training set."""
    identity: dict[str, Any]
    """Everything that changes the results."""
    finished: bool = False
    """Whether the output holds this training, finished."""
    remarks: tuple[str, ...] = ()
    """Notes on the output and on input files that are not read."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Number of training rows by label, once the rows are validated."""
    repeats: list[str] = field(default_factory=list)
    """Notes on duplicate rows, once all rows are validated."""

    @property
    def parts(self) -> dict[str, Part]:
        """The training and the evaluation set, by name."""
        return {"train": self.train, "eval": self.eval}

    @property
    def metric(self) -> str:
        """Name of the metric that selects the best checkpoint; available once the rows are validated."""
        return self.spec.evaluation.metric or self.recipe.metric

    @property
    def fingerprint(self) -> str:
        """Digest of the identity."""
        return digest(self.identity)

    @property
    def notes(self) -> list[str]:
        """Notes on the rows, such as an evaluation set in the training set; available once the rows are validated."""
        train, eval_ = self.train.read, self.eval.read
        files = [
            {join(part.read.path, piece.file) for split in part.splits for piece in split.pieces}
            for part in (self.train, self.eval)
        ]
        both = sorted(files[0] & files[1])
        if not both or self.eval.aside or (train.filter and eval_.filter and train.filter != eval_.filter):
            return [*self.recipe.notes, *self.remarks, *self.repeats]
        return [
            *self.recipe.notes,
            *self.remarks,
            f"eval contains rows of train, from {both[0]}{' and others' if len(both) > 1 else ''}: metrics on rows "
            "that the model was trained on are too good; remove them from train, or leave eval out to hold out a share",
        ]

    @property
    def title(self) -> str:
        """A short title of the training."""
        return f"{self.spec.task} with {self.model.name}, {self.spec.method.name}"

    def job(self) -> dict[str, Any]:
        """Returns the content of job.json: plain values without secrets."""
        spec = self.spec.model_dump(mode="json")
        return {
            "hfbatch": __version__,
            "spec": spec,
            "identity": self.identity,
            "fingerprint": self.fingerprint,
            "versions": versions(),
        }


def make_finetune_plan(spec: FinetuneSpec, overwrite: bool = False) -> FinetunePlan:
    """Plans a fine-tuning, and checks everything that needs no rows. :raises SpecError: with every fault found."""
    faults: list[str] = []
    spec = _with_task(_with_absolute_paths(spec))
    model, recipe = _model_and_recipe(spec, faults)
    sources = _sources(spec, faults)
    bound = {} if recipe is None else _columns(recipe, spec, sources, faults)
    types = {
        part: {
            name: storage_type(sources[part].schema.field(column).type) for name, column in columns.items()
        }
        for part, columns in bound.items()
    }
    if recipe is not None and model is not None and not faults:
        with gather(faults):
            faults += recipe.type_faults(types["train"], types.get("eval", types["train"]))
            if names := _class_names(recipe, bound, sources):
                spec = spec.model_copy(update={"params": {**spec.params, **names}})
                recipe = build_recipe(spec, model)
    faults += _missing() + reporting_faults(spec) + hub_faults(spec.push_to_hub)
    state, remarks = _place(spec, faults)
    if faults or model is None or recipe is None:
        raise SpecError(list(dict.fromkeys(faults)))
    parts = _parts(spec, sources, bound, recipe.task.split_rows)
    remarks += [note for name, source in sources.items() for note in left_out_notes(source, name)]
    identity = training_identity(spec, model, parts)
    plan = FinetunePlan(spec, model, recipe, *parts, types["train"], identity, remarks=tuple(remarks))
    if state and not overwrite:
        plan.finished = is_finished(state, plan.spec, plan.identity)
    return plan


def _with_task(spec: FinetuneSpec) -> FinetuneSpec:
    """Returns the spec with the recipe's own name and all params. :raises SpecError: if there is none, or a param is wrong."""
    cls = recipe_class(spec.task)
    spec = spec.model_copy(update={"task": cls.name, "params": {**named(spec.task)[1], **spec.params}})
    try:
        cls.Params.model_validate(spec.params)
    except ValueError as error:
        raise SpecError(faults_of(error, cls.Params, "params")) from error  # type: ignore[arg-type]
    return spec


def _model_and_recipe(spec: FinetuneSpec, faults: list[str]) -> tuple[Model | None, Recipe | None]:
    """Finds the model and builds the recipe; adds what is wrong with them, or with training them so, to the faults."""
    model = recipe = None
    methods = recipe_class(spec.task).methods
    with gather(faults):
        if spec.model.file:
            raise SpecError(
                "model.file: a GGUF file holds rounded weights and is not fine-tuned; give the model that it was made from"
            )
        model = pin(spec.model, weights=not spec.model.scratch)
    if model is not None:
        with gather(faults), model_faults(spec.model.name):
            recipe = build_recipe(spec, model)
            faults += recipe.check() + override_faults(spec, recipe)
            if spec.method.name in methods:
                faults += method_faults(spec, recipe)
    if spec.method.name not in methods:
        allowed = ", ".join(methods)
        faults.append(f"method {spec.method.name!r} is not available for {spec.task}; use one of: {allowed}")
    return model, recipe


def _place(spec: FinetuneSpec, faults: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns what the output holds of this training, and remarks on its lock; adds what is wrong with it to the faults."""
    state, found = _output(spec)
    guard = None
    try:
        guard = None if found else guard_note(spec.output)
    except OSError as error:
        found = [f"output {spec.output} cannot be locked: {one_line(error)}; grant access to it"]
    faults += found
    with gather(faults):
        faults += _inside(spec)
    return state, [guard] if guard else []


def _missing() -> list[str]:
    """Checks that the packages for training are installed."""
    missing = [name for name in TRAINING if find_spec(name) is None]
    if not missing:
        return []
    return [
        f"fine-tuning needs packages that are missing ({', '.join(missing)}); install hfbatch with its extra `train`, on "
        "every node"
    ]


def _with_absolute_paths(spec: FinetuneSpec) -> FinetuneSpec:
    def moved(given: InputSpec | None) -> InputSpec | None:
        return given and with_absolute_paths(given)

    update = {"train": moved(spec.train), "eval": moved(spec.eval), "output": absolute(spec.output)}
    return spec.model_copy(update=update)


def _sources(spec: FinetuneSpec, faults: list[str]) -> dict[str, Source]:
    """Opens the files of the training and the evaluation set; names faults as in this spec."""
    sources: dict[str, Source] = {}
    for name, given in (("train", spec.train), ("eval", spec.eval)):
        if given is not None:
            found: list[str] = []
            with gather(found):
                sources[name] = open_source(given)
                found += filter_faults(given.filter, sources[name].schema) if given.filter else []
            faults += [_renamed(fault, name) for fault in found]
    return sources


def _renamed(fault: str, name: str) -> str:
    """Replaces `input` by `train` or `eval` in a fault."""
    fault = re.sub(r"\binput\.(?=path|format|filter|columns|types)", f"{name}.", fault)
    return fault.replace(" not in input (has", f" not in {name} (has")


def _columns(
    recipe: Recipe, spec: FinetuneSpec, sources: Mapping[str, Source], faults: list[str]
) -> dict[str, dict[str, str]]:
    """Maps columns of the recipe to columns of the dataset, for each set of rows; names faults as in this spec."""
    bound = {}
    for name, source in sources.items():
        given = spec.train if name == "train" else spec.eval or spec.train
        found: list[str] = []
        columns = bind_columns(given.columns, source, recipe.columns, found, f"fine-tuning {recipe.name}")
        bound[name] = recipe.choose(columns, set(given.columns))
        found += recipe.column_faults(set(bound[name]))
        found += source.faults_of(_columns_read(given, source, bound[name]))
        faults += [_renamed(fault, name) for fault in found]
    return bound


def _class_names(
    recipe: Recipe, bound: Mapping[str, Mapping[str, str]], sources: Mapping[str, Source]
) -> dict[str, tuple[str, ...]]:
    """Returns class names from the files for the params of class names that the spec leaves out.

    :raises SpecError: if files give different names.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, param in recipe.numbered.items():
        if getattr(recipe.params, param) is not None:
            continue
        of_parts = {part: sources[part].classes_of(columns.get(name, "")) for part, columns in bound.items()}
        given = {names for names in of_parts.values() if names}
        if len(given) > 1:
            raise SpecError(
                f"train and eval have different names for the classes of {name!r}: "
                f"{' and '.join(map(str, of_parts.values()))}; give them as params.{param}"
            )
        for names in given:
            found[param] = names
    return found


def _parts(
    spec: FinetuneSpec, sources: Mapping[str, Source], bound: Mapping[str, Mapping[str, str]], rows: int
) -> tuple[Part, Part]:
    """Returns the training and the evaluation set. :param rows: default rows of a split."""
    train = _part("train", spec.train, sources["train"], bound["train"], rows)
    if spec.eval is not None:
        return train, _part("eval", spec.eval, sources["eval"], bound["eval"], rows)
    share = spec.evaluation.fraction, spec.seed
    return replace(train, share=share), replace(train, share=share, aside=True)


def _columns_read(given: InputSpec, source: Source, columns: Mapping[str, str]) -> set[str]:
    return {*columns.values(), *(filter_columns(given.filter, source.schema) if given.filter else ())}


def _part(name: str, given: InputSpec, source: Source, columns: Mapping[str, str], rows: int) -> Part:
    """Returns what every process needs to read the rows of `train` or `eval`. :param rows: default rows of a split."""
    wanted = _columns_read(given, source, columns)
    names = tuple(name for name in source.schema.names if name in wanted)
    schema = pa.schema([(name, storage_type(source.schema.field(name).type)) for name in names])
    hive = {name: kind for name, kind in source.hive.items() if name in names}
    read = ReadPlan(
        source.root_url, source.format, names, schema, hive, given.filter, name, source.given & set(names)
    )
    files = RowFiles(source.root_url, given.files, name)
    return Part(source.cut(given.split_rows or rows, given.limit), read, columns, files=files)


def look_again(plan: FinetunePlan, overwrite: bool) -> None:
    """Updates a plan from the output, once this process holds its lock.

    :raises SpecError: if the output holds another training by now.
    """
    state, faults = _output(plan.spec)
    if faults:
        raise SpecError(faults)
    plan.finished = bool(state) and not overwrite and is_finished(state or {}, plan.spec, plan.identity)


def _output(spec: FinetuneSpec) -> tuple[dict[str, Any] | None, list[str]]:
    """Reads job.json of an earlier training in the output; also returns faults of the folder. Changes nothing.

    Files under the names that a training writes belong to it only if its job.json exists; others are not replaced.
    """
    ledger, shown = Ledger(spec.output), spec.output
    fault = ledger.check_writable()
    if fault:
        return None, [fault]
    try:
        job = ledger.read_job()
    except SplitError:  # damaged
        job = {}
    if is_training(job):
        return job, []
    if ledger.list_parts() or job:
        return None, [f"output {shown} holds the output of a job; choose another folder"]
    there = [name for name in OURS if kind_of(ledger.fs, f"{ledger.root}/{name}") != "nothing"]
    if there:
        return None, [
            f"output {shown} holds {', '.join(there)}, but no training (there is no {JOB}); choose another "
            "folder, or move them away"
        ]
    return None, []


def _inside(spec: FinetuneSpec) -> list[str]:
    """Checks that the output does not contain the base model, and is in no folder of rows, where it would be read."""
    if Path(spec.model.name).is_dir() and lies_in(real_path(spec.model.name), real_path(spec.output)):
        return [
            f"model {spec.model.name} lies in the output {spec.output}, where the new model takes its place; choose "
            "another output"
        ]
    given = {"train": spec.train, "eval": spec.eval}
    return [
        f"output {spec.output} lies in the folder of {name}.path, where the next run would read it; "
        "choose a folder outside"
        for name, one in given.items()
        if one and reads(one.path, spec.output)
    ]
