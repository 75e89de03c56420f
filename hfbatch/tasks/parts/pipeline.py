"""The adapter: runs a task through the steps of its transformers pipeline, each where it belongs.

    preprocess    CPU     the pipeline's preprocess, over a skeleton of the model without weights
    forward       device  the pipeline's forward; rows whose tensors have the same shapes as one batch
    postprocess   CPU     the pipeline's postprocess

So each answer is the pipeline's for that row alone: a batch holds no padding that the pipeline would not have
made. A task that uses it says which pipeline, what a row is, and what its output columns are.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import UserDict, defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.filesystem import one_line
from hfbatch.data.finite import non_finite
from hfbatch.errors import NonFiniteOutput
from hfbatch.tasks.base import FINITE, Batch, Features, Histogram, Task, change_tokenizer, no_embedding
from hfbatch.tasks.parts.generation import read_defaults
from hfbatch.tasks.parts.labels import LABEL_LISTS, best_scores
from hfbatch.tasks.parts.packing import dump, load
from hfbatch.tasks.parts.text import length_limit
from hfbatch.tasks.parts.vocabulary import check_vocabulary

if TYPE_CHECKING:
    import torch

_MAKING = Lock()
NO_LIMIT = int(1e30)
"""How tokenizers write that there is none."""
Inputs = UserDict[str, Any]
"""Model inputs, as the class of mapping that pipelines make."""
PROCESSORS = {
    "tokenizer": "AutoTokenizer",
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
    "processor": "AutoProcessor",
}
"""What a pipeline may ask for besides the model, and the transformers class that loads it."""


class PipelineTask(Task):
    """Base of tasks that go through their transformers pipeline."""

    pipeline: ClassVar[str]
    """Module and class under transformers.pipelines, such as `fill_mask.FillMaskPipeline`, or one of hfbatch's own."""
    batched: bool = True
    """Whether rows of the same shapes may run as one batch; False where forward takes one row alone."""
    keeps: ClassVar[tuple[str, ...] | None] = None
    """Model outputs that postprocess reads; None keeps all, hidden states included."""
    split_rows = 1024
    _on_device: Any = None

    @abstractmethod
    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """What the pipeline is given for each row, without nulls."""

    def options(self) -> dict[str, Any]:
        """The pipeline's keyword arguments: those of the params that are not null."""
        return {name: value for name, value in self.params.model_dump().items() if value is not None}

    def answer(self, result: Any) -> tuple[Any, ...]:
        """A row's output columns, as plain values, from what the pipeline returned for it; one column takes it whole."""
        return (result,)

    @cached_property
    def kind(self) -> type[Any]:
        """The pipeline's class."""
        module, _, name = self.pipeline.rpartition(".")
        home = module if module.startswith("hfbatch.") else f"transformers.pipelines.{module}"
        return getattr(import_module(home), name)

    @cached_property
    def processors(self) -> dict[str, Any]:
        """What the pipeline needs besides the model; each comes from the model's files."""
        import transformers

        found: dict[str, Any] = {}
        for name, auto in PROCESSORS.items():
            wanted = getattr(self.kind, f"_load_{name}")
            if wanted is False:
                continue
            options: dict[str, Any] = {"trust_remote_code": self.model.trust_remote_code}
            if name in ("image_processor", "processor"):
                options["backend"] = "pil"  # the same pixels on every machine; torchvision is no dependency
            try:
                if name == "tokenizer":
                    found[name] = self.tokenizer
                    found[name].model_max_length = self.limit or NO_LIMIT
                else:
                    found[name] = getattr(transformers, auto).from_pretrained(self.model.folder, **options)
                    if getattr(found[name], "tokenizer", None) is not None:
                        check_vocabulary(found[name].tokenizer, self.model.folder)
                        change_tokenizer(found[name].tokenizer, self.tokenizer_changes)
                        found[name].tokenizer.model_max_length = self.limit or NO_LIMIT
            except (OSError, ValueError):
                if wanted:  # others are for some models of the task alone
                    raise
        return found

    @cached_property
    def limit(self) -> int | None:
        """Most tokens of a row."""
        return self.max_length or length_limit(self.tokenizer, self.config)

    @cached_property
    def embedded(self) -> int | None:
        """How many token ids the model has embeddings for; None where it does not tell, or reads media.

        Models put media in the place of tokens, which need no embedding then.
        """
        if self.takes != {"text"}:
            return None
        try:
            table = self.skeleton.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        rows = getattr(table, "num_embeddings", None)
        return None if rows is None else max(int(rows), self.vocabulary or 0)

    @cached_property
    def skeleton(self) -> Any:
        """The pipeline over a model without weights, for the steps on the CPU."""
        import torch
        import transformers

        with torch.device("meta"):
            model = getattr(transformers, self.auto_class).from_config(
                self.config, trust_remote_code=self.model.trust_remote_code
            )
        if model.can_generate():
            model.generation_config = read_defaults(self.model, self.config)
        return self.over(model)

    def over(self, model: Any) -> Any:
        """The pipeline over a model, on the device where that is."""
        return self.kind(
            model=model, task=self.name, device=model.device, **self.processors, **self.options()
        )

    def _over_device(self, model: Any) -> Any:
        """The pipeline over the worker's model, made once: tokenizers must not be used by two threads at a time."""
        with _MAKING:
            if self._on_device is None or self._on_device.model is not model:
                self._on_device = self.over(model)
            return self._on_device

    def check(self) -> list[str]:
        """Faults: a model or params that the pipeline refuses, or a library that it lacks."""
        try:
            _ = self.skeleton
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            cause = one_line(error)
            return [f"model {self.model.name!r} cannot do {self.name} with these params: {cause}"]
        return []

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Model inputs of each row as bytes, in the column `inputs`, and their number of elements, `cost`."""
        pipe = self.skeleton
        packed, costs, cut = [], [], []
        for row in self.rows(columns):
            made = pipe.preprocess(row, **copy.deepcopy(pipe._preprocess_params))
            steps = [made] if isinstance(made, Mapping) else list(made)
            self._check_tokens(steps)
            packed.append(dump(steps))
            costs.append(sum(cost_of(step) for step in steps))
            cut.append(self.is_cut(row, steps))
        table = {"inputs": pa.array(packed, pa.large_binary()), "cost": pa.array(costs, pa.int64())}
        return Features(pa.table(table), np.array(cut, bool))

    def _check_tokens(self, steps: list[Any]) -> None:
        """:raises ValueError: for a token without an embedding, which on a GPU would cost the whole process."""
        if self.embedded is None or not self.not_embedded:
            return
        for step in steps:
            most = int(step["input_ids"].max()) if "input_ids" in step else 0
            if most >= self.embedded:
                raise ValueError(no_embedding(self, most))

    def is_cut(self, row: Any, steps: list[Any]) -> bool:
        """Whether a row was truncated on its way into model inputs."""
        return False

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Elements of each row's main input, so that rows of one shape lie side by side."""
        return features["cost"].to_numpy()

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """The rows' model inputs as they are."""
        taken = features["inputs"].take(pa.array(rows))
        return {"rows": [load(one.as_buffer(), UserDict) for one in taken]}

    def padded_size(self, batch: Batch) -> int:
        """Elements that the device computes."""
        return sum(cost_of(step) for steps in batch["rows"] for step in steps)

    def forward(self, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """`outputs`: bytes of each row's model outputs; and `FINITE`.

        The steps of all rows go together where they are of one shape, as many at a time as the batch has rows.
        """
        pipe, rows = self._over_device(model), batch["rows"]
        results: list[list[Any]] = [[None] * len(steps) for steps in rows]
        finite = np.ones(len(rows), bool)
        alike: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        for place, steps in enumerate(rows):
            for k, step in enumerate(steps):
                alike[self.kin_of(step) if self.batched else (place, k)].append((place, k))
        for places in alike.values():
            for start in range(0, len(places), len(rows)):
                chosen = places[start : start + len(rows)]
                inputs = [_for_model(rows[place][k], model) for place, k in chosen]
                for (place, k), (output, fine) in zip(chosen, self._run_finite(pipe, inputs), strict=True):
                    results[place][k] = self._kept(output)
                    finite[place] &= fine
        return {"outputs": [dump(row) for row in results], FINITE: finite}

    def kin_of(self, step: Mapping[str, Any]) -> Any:
        """What steps must have in common to run as one batch."""
        return shape_of(step)

    def together(self, rows: list[Inputs]) -> Inputs:
        """Steps that are kin as one batch."""
        return join(rows)

    def _kept(self, step: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in step.items() if self.keeps is None or key in self.keeps}

    def chooses_by(self) -> tuple[type[torch.nn.Module], ...]:
        """Kinds of layers by whose numbers a model chooses what to return, where it returns none of them."""
        return ()

    def _run_finite(self, pipe: Any, rows: list[Inputs]) -> list[tuple[Any, bool]]:
        """Model outputs of each step, and whether they are finite, with what was chosen by on the way to them.

        What the model returns on that way is of the whole batch: where it is not finite, steps run one by one.
        """
        from hfbatch.tasks.parts.finite import is_finite, watched

        with watched(pipe.model, self.chooses_by()) as seen:
            made = self._run(pipe, rows)
        if self.finite and not seen.finite:
            if len(rows) == 1:
                return [(made[0], False)]
            return [pair for row in rows for pair in self._run_finite(pipe, [row])]
        return [(output, is_finite(self._kept(output))) for output in made]

    def _run(self, pipe: Any, rows: list[Inputs]) -> list[Any]:
        """Model outputs of each step, from one call where the outputs can be told apart."""
        if len(rows) > 1:
            together = pipe.forward(self.together(rows), **pipe._forward_params)
            if splits(together, len(rows)):
                return [pick(together, place, row) for place, row in enumerate(rows)]
        return [pipe.forward(UserDict(row), **pipe._forward_params) for row in rows]

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """The pipeline's answers as columns."""
        pipe = self.skeleton
        several = isinstance(pipe, import_module("transformers.pipelines.base").ChunkPipeline)
        answers = []
        for one in outputs["outputs"]:
            steps = load(one.as_buffer())
            result = pipe.postprocess(steps if several else steps[0], **pipe._postprocess_params)
            answers.append(self.answer(result))
        fields = self.output_fields()
        made = [pa.array([row[k] for row in answers], field.type) for k, field in enumerate(fields)]
        for field, column in zip(fields, made, strict=True):
            if self.finite and len(non_finite(column)):
                raise NonFiniteOutput(f"{field.name} is NaN or infinite")
        return made


class LabelTask(PipelineTask):
    """Base of tasks whose pipeline returns labels with scores, best first."""

    histogram = Histogram("score", tuple(step / 20 for step in range(21)))

    def output_fields(self) -> list[pa.Field]:
        """`label` and `score`, lists of one length."""
        return list(LABEL_LISTS)

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Labels and scores apart."""
        return [one["label"] for one in result], [one["score"] for one in result]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best label of each row."""
        return best_scores(columns)


def cost_of(step: Mapping[str, Any]) -> int:
    """Elements of a step's main input that count: those that its mask shows, else token ids, else its first tensor."""
    import torch

    if isinstance(mask := step.get("attention_mask"), torch.Tensor):
        return int(mask.sum())
    tensors = [value for value in step.values() if isinstance(value, torch.Tensor)]
    main = step.get("input_ids", tensors[0] if tensors else None)
    return int(main.numel()) if isinstance(main, torch.Tensor) else 1


def shape_of(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """What steps must have in common to run as one batch: names, shapes and types of tensors; nested tensors whole."""
    import torch

    def key_of(value: Any) -> Any:
        """What to compare of a value: texts and numbers are a row's own, and no part of the computation."""
        if isinstance(value, torch.Tensor):
            return value.shape, value.dtype
        return dump(value) if isinstance(value, list | Mapping) else None

    return tuple((key, key_of(value)) for key, value in step.items())


def join(rows: list[Inputs]) -> Inputs:
    """Rows as one batch: tensors end to end, other values those of the first row."""
    import torch

    first = rows[0]
    return UserDict(
        {
            key: torch.cat([row[key] for row in rows]) if isinstance(value, torch.Tensor) else value
            for key, value in first.items()
        }
    )


def splits(value: Any, rows: int) -> bool:
    """Whether every tensor within has one entry for each row."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.ndim > 0 and len(value) == rows
    if isinstance(value, Mapping):
        return all(splits(one, rows) for one in value.values())
    return all(splits(one, rows) for one in value) if isinstance(value, list | tuple) else True


def pick(value: Any, place: int, row: Mapping[str, Any]) -> Any:
    """One row of a batch's outputs; what the model passed on from its inputs is the row's own."""
    import torch

    if isinstance(value, torch.Tensor):
        return value[place : place + 1]
    if isinstance(value, Mapping):
        own = {key: one for key, one in row.items() if not isinstance(one, torch.Tensor)}
        return {key: own.get(key, pick(one, place, {})) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(pick(one, place, {}) for one in value)
    return value


def _for_model(step: Inputs, model: torch.nn.Module) -> Inputs:
    """Model inputs with floating-point tensors in the model's type."""
    import torch

    kind = next(model.parameters()).dtype
    return UserDict(
        {
            key: value.to(kind) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in step.items()
        }
    )
