"""The plan of a fine-tuning: the spec made concrete, all faults together. Starts nothing, changes nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from hfbatch import __version__
from hfbatch.compute.checks import model_faults
from hfbatch.data.filesystem import READ_ERRORS, absolute, join, kind_of, lies_in, open_filesystem, redact
from hfbatch.data.ledger import Ledger
from hfbatch.data.media_files import RowFiles, with_absolute_paths
from hfbatch.data.models import Model, pin
from hfbatch.data.reader import ReadPlan, filter_columns, filter_faults
from hfbatch.data.source import Source, open_source
from hfbatch.errors import SpecError
from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.plan import bind_columns, gather, versions
from hfbatch.spec import InputSpec, faults_of
from hfbatch.tasks import named
from hfbatch.train.adapters import method_faults
from hfbatch.train.features import Part
from hfbatch.train.hub import hub_faults
from hfbatch.train.model import override_faults
from hfbatch.train.order import build_recipe
from hfbatch.train.recipes import recipe_class
from hfbatch.train.recipes.base import Recipe
from hfbatch.train.reporting import reporting_faults

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
"""Modules of the extra `train` that any training may come to need."""


@dataclass
class FinetunePlan:
    """A fine-tuning that is ready to start, but for what its rows hold."""

    spec: FinetuneSpec
    model: Model
    recipe: Recipe
    train: Part
    eval: Part
    types: dict[str, pa.DataType]
    """Of the recipe's columns in training."""
    identity: dict[str, Any]
    """What changes results."""
    finished: bool = False
    """Whether the output holds this training, done."""

    @property
    def parts(self) -> dict[str, Part]:
        """Both sets of rows, by name."""
        return {"train": self.train, "eval": self.eval}

    @property
    def metric(self) -> str:
        """What decides which checkpoint is the best; the recipe has to be settled."""
        return self.spec.evaluation.metric or self.recipe.metric

    @property
    def fingerprint(self) -> str:
        """Digest of the identity."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def notes(self) -> list[str]:
        """What to mind about the rows; the recipe has to be settled. Those to measure with may be learnt from too."""
        train, eval_ = self.train.read, self.eval.read
        files = [
            {join(part.read.path, piece.file) for split in part.splits for piece in split.pieces}
            for part in (self.train, self.eval)
        ]
        both = sorted(files[0] & files[1])
        if not both or self.eval.aside or (train.filter and eval_.filter and train.filter != eval_.filter):
            return self.recipe.notes
        return [
            *self.recipe.notes,
            f"eval holds rows that train holds too, of {redact(both[0])}{' and others' if len(both) > 1 else ''}: a model "
            "does well on what it has learnt by heart; take them out of train, or leave eval out for a share of train",
        ]

    @property
    def title(self) -> str:
        """The training in a few words."""
        return f"{self.spec.task} with {self.model.name}, {self.spec.method.name}"

    def job(self) -> dict[str, Any]:
        """The content of job.json: no secrets, plain values."""
        spec = self.spec.model_dump(mode="json")
        for section in ("train", "eval"):
            if spec[section]:
                spec[section]["path"] = redact(spec[section]["path"])
        spec["output"] = redact(spec["output"])
        return {
            "hfbatch": __version__,
            "spec": spec,
            "identity": self.identity,
            "fingerprint": self.fingerprint,
            "versions": versions(),
        }


def make_finetune_plan(spec: FinetuneSpec, overwrite: bool = False) -> FinetunePlan:
    """Checks all that can be checked without reading rows. :raises SpecError: with every fault found."""
    faults: list[str] = []
    spec = _with_absolute_paths(spec)
    with gather(faults):
        cls = recipe_class(spec.task)
        spec = spec.model_copy(update={"task": cls.name, "params": {**named(spec.task)[1], **spec.params}})
        try:
            cls.Params.model_validate(spec.params)
        except ValueError as error:
            faults += faults_of(error, cls.Params, "params")  # type: ignore[arg-type]
    if faults:
        raise SpecError(faults)
    model = recipe = None
    with gather(faults):
        model = pin(spec.model, weights=not spec.model.scratch)
    if model is not None:
        with gather(faults), model_faults(spec.model.name):
            recipe = build_recipe(spec, model)
            faults += recipe.check() + override_faults(spec, recipe)
            if spec.method.name in cls.methods:
                faults += method_faults(spec, recipe)
    if spec.method.name not in cls.methods:
        allowed = ", ".join(cls.methods)
        faults.append(f"method {spec.method.name!r} trains nothing in {cls.name}; use one of: {allowed}")
    sources = _sources(spec, faults)
    bound = {} if recipe is None else _columns(recipe, spec, sources, faults)
    types = {
        part: {name: sources[part].schema.field(column).type for name, column in columns.items()}
        for part, columns in bound.items()
    }
    if recipe is not None and not faults:
        with gather(faults):
            faults += recipe.type_faults(types["train"], types.get("eval", types["train"]))
            names = _class_names(recipe, bound, sources)
            spec = spec.model_copy(update={"params": {**spec.params, **names}})
            recipe.params = recipe.Params.model_validate(spec.params)
    faults += _missing() + reporting_faults(spec) + hub_faults(spec.push_to_hub)
    state, more = _output(spec, overwrite)
    faults += more + _inside(spec)
    if faults or model is None or recipe is None:
        raise SpecError(list(dict.fromkeys(faults)))
    parts = _parts(spec, sources, bound, recipe.task.split_rows)
    plan = FinetunePlan(spec, model, recipe, *parts, types["train"], _identity(spec, model, parts))
    if state and not overwrite:
        plan.finished = _same(state, plan)
    return plan


def _missing() -> list[str]:
    """The fault of an hfbatch without what training needs."""
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
    """The files of both sets of rows. What is wrong with them is put under the names of this spec."""
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
    """A fault of a job's input, told of `train` or `eval`."""
    fault = re.sub(r"\binput\.(?=path|format|filter|columns)", f"{name}.", fault)
    return fault.replace(" not in input (has", f" not in {name} (has")


def _columns(
    recipe: Recipe, spec: FinetuneSpec, sources: Mapping[str, Source], faults: list[str]
) -> dict[str, dict[str, str]]:
    """Column of the recipe to column of the rows, for each set of rows; faults have the names of this spec."""
    bound = {}
    for name, source in sources.items():
        given = spec.train if name == "train" else spec.eval or spec.train
        found: list[str] = []
        columns = bind_columns(given.columns, source, recipe.columns, found, f"fine-tuning {recipe.name}")
        bound[name] = recipe.choose(columns, set(given.columns))
        found += recipe.column_faults(set(bound[name]))
        faults += [_renamed(fault, name) for fault in found]
    return bound


def _class_names(
    recipe: Recipe, bound: Mapping[str, Mapping[str, str]], sources: Mapping[str, Source]
) -> dict[str, tuple[str, ...]]:
    """Params that the spec leaves out and that name numbers of classes, as the files do.

    :raises SpecError: when files give them different names.
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
    """The rows to learn from, and those to measure with. :param rows: of a split, unless the spec says."""
    train = _part("train", spec.train, sources["train"], bound["train"], rows)
    if spec.eval is not None:
        return train, _part("eval", spec.eval, sources["eval"], bound["eval"], rows)
    share = spec.evaluation.fraction, spec.seed
    return replace(train, share=share), replace(train, share=share, aside=True)


def _part(name: str, given: InputSpec, source: Source, columns: Mapping[str, str], rows: int) -> Part:
    """What every process needs to read the rows of `train` or `eval`. :param rows: of a split, unless the spec says."""
    wanted = {*columns.values(), *(filter_columns(given.filter, source.schema) if given.filter else ())}
    names = tuple(name for name in source.schema.names if name in wanted)
    schema = pa.schema([source.schema.field(name) for name in names])
    hive = {name: kind for name, kind in source.hive.items() if name in names}
    read = ReadPlan(source.root_url, source.format, names, schema, hive, given.filter, name)
    files = RowFiles(source.root_url, given.files, name)
    return Part(source.cut(given.split_rows or rows, given.limit), read, columns, files=files)


def _identity(spec: FinetuneSpec, model: Model, parts: tuple[Part, Part]) -> dict[str, Any]:
    """What changes the model that comes out. The number of workers and how a step is cut do not."""
    plain = spec.model_dump(mode="json")
    for name in ("output", "workers", "report_to", "push_to_hub", "train", "eval"):
        plain.pop(name)
    plain["batch"].pop("per_device")
    if spec.workers.strategy == "fsdp":
        plain["workers"] = {"strategy": "fsdp"}  # its checkpoints are for itself alone
    plain["model"] = {**plain["model"], "name": None, "revision": None, "commit": model.commit}
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        splits, read = [split.to_dict() for split in part.splits], part.read
        taken = [splits, dict(part.columns), read.filter, part.share, part.aside]
        digest.update(json.dumps(taken).encode())
    return {**plain, "data": digest.hexdigest()}


def _output(spec: FinetuneSpec, overwrite: bool) -> tuple[dict[str, Any] | None, list[str]]:
    """What job.json of an earlier training there says; and what is wrong with the folder, nothing being changed."""
    ledger = Ledger(spec.output)
    fault = ledger.check_writable()
    if fault:
        return None, [fault]
    fs, root = ledger.fs, ledger.root
    try:
        with fs.open_input_stream(f"{root}/_hfbatch/job.json") as stream:
            return json.loads(stream.read()), []
    except READ_ERRORS:
        there = [
            name
            for name in ("_SUCCESS", "metrics.json", "model")
            if kind_of(fs, f"{root}/{name}") != "nothing"
        ]
    if there and not overwrite:
        return None, [
            f"output {redact(spec.output)} holds {', '.join(there)} of no known training (no _hfbatch/job.json); choose "
            "another folder, or replace it with --overwrite"
        ]
    return None, []


def _inside(spec: FinetuneSpec) -> list[str]:
    """The fault of an output that holds the model to begin with, or lies among the rows, which the next run would read."""
    if Path(spec.model.name).is_dir() and lies_in(absolute(spec.model.name), spec.output):
        return [
            f"model {spec.model.name} lies in the output {spec.output}, where the new model takes its place; choose "
            "another output"
        ]
    given = {"train": spec.train, "eval": spec.eval}
    return [
        f"output {redact(spec.output)} lies in the folder of {name}.path, where the next run would read it; "
        "choose a folder outside"
        for name, one in given.items()
        if one and lies_in(spec.output, one.path)
    ]


def _same(state: dict[str, Any], plan: FinetunePlan) -> bool:
    """Whether the output holds this training, done. :raises SpecError: if it holds another one."""
    if "train" not in state.get("spec", {}):
        raise SpecError(f"output {redact(plan.spec.output)} holds the output of a job; choose another folder")
    old, new = _leaves(state["identity"]), _leaves(plan.identity)
    for leaves in (old, new):
        leaves.setdefault("workers.strategy", "ddp")
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differing:
        shown = "; ".join(
            f"{name} (there: {old.get(name)!r}, now: {new.get(name)!r})" for name in sorted(differing)
        )
        raise SpecError(
            f"output {redact(plan.spec.output)} holds another training; it differs in {shown}. Choose another "
            "output, or replace it with --overwrite"
        )
    fs, root = open_filesystem(join(plan.spec.output, "_SUCCESS"))
    return fs.get_file_info(root).is_file


def _leaves(values: dict[str, Any], of: str = "") -> dict[str, Any]:
    """Nested values by their full names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        found |= _leaves(value, f"{of}{name}.") if nested else {f"{of}{name}": value}
    return found
