"""The adapter: runs the steps of a transformers pipeline, each on the CPU or the device.

    preprocess    CPU     the pipeline's preprocess, over a skeleton of the model without weights
    forward       device  the pipeline's forward; rows whose tensors have equal shapes run as one batch
    postprocess   CPU     the pipeline's postprocess

Results equal those of the pipeline on single rows: batches hold no padding that the pipeline would not add.
A task that uses the adapter defines the pipeline, its input for each row, and the output columns.
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
from hfbatch.engines.base import Capability
from hfbatch.errors import NonFiniteOutput
from hfbatch.spec.prompts import RENDERING
from hfbatch.tasks.answer_agreement import Labels
from hfbatch.tasks.base import FINITE, Batch, Features, Histogram, Task
from hfbatch.tasks.generation.generation_config import read_defaults
from hfbatch.tasks.labels import LABEL_LISTS, best_scores
from hfbatch.tasks.pipelines.serialization import dump, load
from hfbatch.tasks.tokens import length_limit
from hfbatch.tasks.vocabulary import change_tokenizer, check_vocabulary, no_embedding

if TYPE_CHECKING:
    import torch

_MAKING = Lock()
NO_LIMIT = int(1e30)
"""Maximum length of tokenizers without a limit."""
Inputs = UserDict[str, Any]
"""Model inputs, in the mapping class of pipelines."""
PROCESSORS = {
    "tokenizer": "AutoTokenizer",
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
    "processor": "AutoProcessor",
}
"""Components that a pipeline may need besides the model, and the transformers classes that load them."""


class PipelineTask(Task):
    """Base class of tasks that run a transformers pipeline."""

    pipeline: ClassVar[str]
    """Module and class under transformers.pipelines, such as `fill_mask.FillMaskPipeline`, or one of hfbatch's own."""
    batched: bool = True
    """Whether rows of equal shapes may run as one batch; False if forward takes only single rows."""
    keeps: ClassVar[tuple[str, ...] | None] = None
    """Model outputs that postprocess reads; None keeps all, including hidden states."""
    split_rows = 1024
    _on_device: Any = None

    @abstractmethod
    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields the pipeline's input for each row, without nulls."""

    def options(self) -> dict[str, Any]:
        """Returns the pipeline's keyword arguments: by default, the params that are not null and render no input."""
        given = self.params.model_dump(exclude={*RENDERING})
        return {name: value for name, value in given.items() if value is not None}

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Converts a pipeline result to plain values of the output columns; a single column takes the whole result."""
        return (result,)

    @cached_property
    def kind(self) -> type[Any]:
        """The pipeline class."""
        module, _, name = self.pipeline.rpartition(".")
        home = module if module.startswith("hfbatch.") else f"transformers.pipelines.{module}"
        return getattr(import_module(home), name)

    @cached_property
    def processors(self) -> dict[str, Any]:
        """The pipeline's components besides the model, loaded from the model's files."""
        import transformers

        found: dict[str, Any] = {}
        for name, auto in PROCESSORS.items():
            wanted = getattr(self.kind, f"_load_{name}")
            if wanted is False:
                continue
            options: dict[str, Any] = {"trust_remote_code": self.model.trust_remote_code}
            if name in ("image_processor", "processor"):
                options["backend"] = (
                    "pil"  # the same pixels on every machine; torchvision is not a dependency
                )
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
                if wanted:  # others are needed by some models only
                    raise
        return found

    @cached_property
    def limit(self) -> int | None:
        """Maximum tokens of a row."""
        return self.max_length or length_limit(self.tokenizer, self.config)

    @cached_property
    def embedded(self) -> int | None:
        """Number of token ids with an embedding; None if unknown, or if the model takes media.

        Models replace placeholder tokens with media, so that these tokens need no embedding.
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
        """The pipeline over a model without weights, for the CPU steps."""
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
        """Returns the pipeline over a model, on the model's device."""
        return self.kind(
            model=model, task=self.name, device=model.device, **self.processors, **self.options()
        )

    def _over_device(self, model: Any) -> Any:
        """Returns the cached pipeline over the worker's model: two threads must not share a tokenizer."""
        with _MAKING:
            if self._on_device is None or self._on_device.model is not model:
                self._on_device = self.over(model)
            return self._on_device

    @property
    def asks(self) -> frozenset[Capability]:
        """The module, which the pipeline of transformers takes."""
        return frozenset({Capability.MODULE})

    def check(self) -> list[str]:
        """Returns an error if the pipeline rejects the model or params, or lacks a library."""
        try:
            _ = self.skeleton
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            cause = one_line(error)
            return [f"model {self.model.name!r} does not support {self.name} with these params: {cause}"]
        return []

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns each row's model inputs as bytes in the column `inputs`, and their number of elements in `cost`."""
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
        """Checks token ids. :raises ValueError: for a token without an embedding, which on a GPU fails the process."""
        if self.embedded is None or not self.not_embedded:
            return
        for step in steps:
            most = int(step["input_ids"].max()) if "input_ids" in step else 0
            if most >= self.embedded:
                raise ValueError(no_embedding(most, self.not_embedded, self.embedded))

    def is_cut(self, row: Any, steps: list[Any]) -> bool:
        """Whether a row was truncated by preprocessing."""
        return False

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the elements of each row's main input, so that rows of equal shape are adjacent after sorting."""
        return features["cost"].to_numpy()

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns the rows' model inputs unchanged."""
        taken = features["inputs"].take(pa.array(rows))
        return {"rows": [load(one.as_buffer(), UserDict) for one in taken]}

    def padded_size(self, batch: Batch) -> int:
        """Returns the number of elements that the device computes."""
        return sum(cost_of(step) for steps in batch["rows"] for step in steps)

    def forward(self, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns `outputs`, the bytes of each row's model outputs, and `FINITE`.

        Steps of all rows with equal shapes run together, at most as many as the batch has rows.
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
        """Returns the batching key: steps with equal keys may run as one batch."""
        return shape_of(step)

    def together(self, rows: list[Inputs]) -> Inputs:
        """Joins steps with equal keys into one batch."""
        return join(rows)

    def _kept(self, step: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in step.items() if self.keeps is None or key in self.keeps}

    def chooses_by(self) -> tuple[type[torch.nn.Module], ...]:
        """Layer classes whose values determine the outputs without being returned."""
        return ()

    def _run_finite(self, pipe: Any, rows: list[Inputs]) -> list[tuple[Any, bool]]:
        """Returns the model outputs of each step, and whether these and intermediate values are finite.

        Intermediate values are checked for the whole batch: if they are not finite, steps run one by one.
        """
        from hfbatch.tasks.finite import is_finite, watched

        with watched(pipe.model, self.chooses_by()) as seen:
            made = self._run(pipe, rows)
        if self.finite and not seen.finite:
            if len(rows) == 1:
                return [(made[0], False)]
            return [pair for row in rows for pair in self._run_finite(pipe, [row])]
        return [(output, is_finite(self._kept(output))) for output in made]

    def _run(self, pipe: Any, rows: list[Inputs]) -> list[Any]:
        """Returns the model outputs of each step, from one call if the outputs can be split by row."""
        if len(rows) > 1:
            together = pipe.forward(self.together(rows), **pipe._forward_params)
            if splits(together, len(rows)):
                return [pick(together, place, row) for place, row in enumerate(rows)]
        return [pipe.forward(UserDict(row), **pipe._forward_params) for row in rows]

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Converts the pipeline's results to columns."""
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
    """Base class of tasks whose pipeline returns labels with scores, best first."""

    agreement = Labels("label")
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))

    @property
    def function(self) -> str:
        """Function applied to logits: softmax, sigmoid or none."""
        return "softmax"

    @property
    def own_agreement(self) -> Labels:
        """Compares scores as the function makes them: which exclude each other, independent ones, or numbers."""
        return Labels("label", function=self.function)

    def output_fields(self) -> list[pa.Field]:
        """`label` and `score`, lists of equal length."""
        return list(LABEL_LISTS)

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Splits labels and scores."""
        return [one["label"] for one in result], [one["score"] for one in result]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the score of the best label of each row."""
        return best_scores(columns)


def cost_of(step: Mapping[str, Any]) -> int:
    """Returns the number of elements in a step's main input: unmasked ones, else token ids, else its first tensor."""
    import torch

    if isinstance(mask := step.get("attention_mask"), torch.Tensor):
        return int(mask.sum())
    tensors = [value for value in step.values() if isinstance(value, torch.Tensor)]
    main = step.get("input_ids", tensors[0] if tensors else None)
    return int(main.numel()) if isinstance(main, torch.Tensor) else 1


def shape_of(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the batching key: names, shapes and types of tensors; the values of nested tensors."""
    import torch

    def key_of(value: Any) -> Any:
        """Returns the comparable part of a value, without texts and numbers, which do not enter the computation."""
        if isinstance(value, torch.Tensor):
            return value.shape, value.dtype
        return dump(value) if isinstance(value, list | Mapping) else None

    return tuple((key, key_of(value)) for key, value in step.items())


def join(rows: list[Inputs]) -> Inputs:
    """Joins rows into one batch: concatenates tensors, takes other values from the first row."""
    import torch

    first = rows[0]
    return UserDict(
        {
            key: torch.cat([row[key] for row in rows]) if isinstance(value, torch.Tensor) else value
            for key, value in first.items()
        }
    )


def splits(value: Any, rows: int) -> bool:
    """Whether every nested tensor has one entry per row."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.ndim > 0 and len(value) == rows
    if isinstance(value, Mapping):
        return all(splits(one, rows) for one in value.values())
    return all(splits(one, rows) for one in value) if isinstance(value, list | tuple) else True


def pick(value: Any, place: int, row: Mapping[str, Any]) -> Any:
    """Returns one row of a batch's outputs; values that the model passes through from its inputs are the row's own."""
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
    """Converts floating-point model inputs to the model's dtype."""
    import torch

    kind = next(model.parameters()).dtype
    return UserDict(
        {
            key: value.to(kind) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in step.items()
        }
    )
