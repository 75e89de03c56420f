"""Training embedding with the losses of sentence-transformers: vectors of related texts become similar.

Training computes vectors as the task does, with its pooling, further modules and prompts. Dense modules are not
trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from hfbatch.spec.finetune import TrainBatchSpec
from hfbatch.spec.section import Auto
from hfbatch.tasks.base import Features, InputColumn, Params, Task
from hfbatch.tasks.multimodal.embedding import Embedding
from hfbatch.tasks.multimodal.embedding_settings import EmbeddingParams
from hfbatch.tasks.tokens import list_lengths, text_column
from hfbatch.train.metrics.classification import regression
from hfbatch.train.metrics.retrieval import cosines, retrieval, triplet_accuracy
from hfbatch.train.recipes.base import DatasetStatistics, Predicted, Recipe, faulty_rows, items_of

if TYPE_CHECKING:
    import torch

TEXTS = {
    "pairs": ("anchor", "positive"),
    "triplets": ("anchor", "positive", "negative"),
    "scores": ("sentence1", "sentence2"),
}
"""Kinds of rows, and their text columns."""
LOSSES = {"pairs": ("ranking",), "triplets": ("ranking", "triplet"), "scores": ("cosent", "cosine")}
"""Losses of each kind of rows, the default first."""
GROUPED = ("ranking", "cosent")
"""Losses that compare the rows of a group."""
LARGEST_GROUP = 32
"""Most rows of a group where params.group is auto."""


class EmbeddingTraining(Params):
    """Loss, pooling and prompts."""

    loss: Literal["auto", "ranking", "triplet", "cosent", "cosine"] = "auto"
    """ranking: the positive before all other texts of the group; triplet: before the row's negative; cosent: cosines
    in the order of the scores; cosine: cosines equal to the scores. auto: ranking, and cosent for scores."""
    group: Annotated[int, Field(ge=2)] | Auto = "auto"
    """Rows that ranking and cosent compare with each other: larger groups are harder. Independent of batch.per_device
    and of the number of workers. auto: the largest divisor of batch.size up to 32."""
    scale: float = Field(default=20, gt=0, allow_inf_nan=False)
    """ranking, cosent: factor of the cosines, the inverse of the temperature."""
    margin: float = Field(default=5, gt=0, allow_inf_nan=False)
    """triplet: how much closer (Euclidean) the positive has to be; use less than 2 for vectors of length 1."""
    pooling: Literal["auto", "mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"] = (
        "auto"
    )
    """How token vectors are pooled; auto: as the model's sentence-transformers files say, else mean."""
    normalize: bool | Literal["auto"] = "auto"
    """Scale vectors to length 1; auto: as the model's sentence-transformers files say."""
    query_prompt: str | None = None
    """Text put before anchors, such as "query: "; saved with the model as its prompt `query`."""
    document_prompt: str | None = None
    """Text put before positives and negatives; saved with the model as its prompt `document`."""

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts by name, which the trained model will have."""
        given = {"query": self.query_prompt, "document": self.document_prompt}
        return {name: text for name, text in given.items() if text}


def is_number(kind: pa.DataType) -> bool:
    """Returns whether a column of this Arrow type holds numbers."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


class EmbeddingRecipe(Recipe):
    """Trains embeddings on pairs, triplets or scored pairs of texts."""

    name = "embedding"
    columns = (
        *(text_column(name, required=False) for name in ("anchor", "positive", "negative")),
        *(text_column(name, required=False) for name in ("sentence1", "sentence2")),
        InputColumn("score", is_number, "float or integer", required=False),
    )
    Params = EmbeddingTraining
    methods = ("full", "lora", "qlora")
    params: EmbeddingTraining
    task: Embedding

    def __init__(
        self,
        task: Task,
        params: Any,
        label_smoothing: float = 0.0,
        batch: TrainBatchSpec | None = None,
        fitted: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(task, params, label_smoothing, batch, fitted)
        self.auto_class = task.auto_class

    @classmethod
    def task_params(
        cls, params: EmbeddingTraining, max_length: int | None, fitted: Mapping[str, Any]
    ) -> EmbeddingParams:
        """Returns the pooling; the recipe adds prompts itself, those of anchors and of other texts."""
        prompt = "" if params.prompts else None
        return EmbeddingParams(pooling=params.pooling, normalize=params.normalize, prompt=prompt)

    @property
    def metric(self) -> str:
        """Name of the metric that selects the best checkpoint."""
        return "spearman" if self.fitted["kind"] == "scores" else "mrr_at_10"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics for the kind of rows."""
        if self.fitted["kind"] == "scores":
            return "spearman", "pearson"
        more = ("triplet_accuracy",) if self.fitted["kind"] == "triplets" else ()
        return "mrr_at_10", "accuracy_at_1", *more

    @property
    def texts(self) -> tuple[str, ...]:
        """Text columns of a row."""
        return TEXTS[self.fitted["kind"]]

    @property
    def grouped(self) -> bool:
        """Whether a row's loss depends on other rows."""
        return self.params.loss in ("auto", *GROUPED)

    @property
    def group(self) -> int:
        """Number of rows that are compared with each other."""
        if not self.grouped:
            return 1
        if self.params.group != "auto":
            return self.params.group
        size = self.batch.size
        return max(part for part in range(1, min(size, LARGEST_GROUP) + 1) if size % part == 0)

    def loss_name(self, kind: str) -> str:
        """Returns the loss for a kind of rows."""
        return LOSSES[kind][0] if self.params.loss == "auto" else self.params.loss

    def check(self) -> list[str]:
        """Checks that the model reads text alone and that the params are consistent."""
        where = f"model {self.task.model.name!r}"
        if self.task.encodes != ("text",):
            return [f"{where} reads images; embedding can be trained only for text models"]
        faults = super().check()
        if self.batch.size % self.group:
            faults.append(
                f"params.group {self.group} does not divide batch.size {self.batch.size}; set batch.size to a "
                f"multiple of {self.group}"
            )
        if self.label_smoothing:
            faults.append("schedule.label_smoothing: embedding has no labels; leave it out")
        if self.params.prompts and not self.task.recipe.include_prompt:
            names = " and ".join(f"params.{name}_prompt" for name in self.params.prompts)
            faults.append(f"{where} excludes prompts from pooling, so that {names} cannot be trained")
        return faults

    def column_faults(self, present: set[str]) -> list[str]:
        """Checks that all columns of exactly one kind of rows are present."""
        pairs, scores = present & set(TEXTS["triplets"]), present & {*TEXTS["scores"], "score"}
        if pairs and scores:
            shown = ", ".join(map(repr, sorted(present)))
            return [f"columns of two kinds at once: {shown}; leave out or rename those of one kind"]
        kind = kind_of(present)
        needed = (*TEXTS[kind], "score") if kind == "scores" else TEXTS["pairs"]
        faults = [
            f"{name!r} is not among the columns; embedding trains on anchor and positive (and negative), or on "
            f"sentence1, sentence2 and score; use --column {name}=COLUMN"
            for name in needed
            if name not in present
        ]
        loss = self.loss_name(kind)
        if loss not in LOSSES[kind]:
            faults.append(f"params.loss {loss!r} is not for {kind}; use {' or '.join(LOSSES[kind])}")
        if self.grouped and self.group == 1:
            faults.append(
                f"batch.size {self.batch.size} leaves groups of one row, in which there is nothing to compare; set it to "
                "a multiple of 32, or set params.group"
            )
        if kind == "scores" and self.params.prompts:
            faults.append("params.query_prompt and params.document_prompt are for anchors; leave them out")
        return faults

    def validate(self, columns: Mapping[str, pa.Array], places: pa.Table) -> DatasetStatistics:
        """Finds null and empty texts, scores outside [-1, 1], and negatives equal to their positive."""
        kind = kind_of(set(columns))
        texts = {name: columns[name].cast(pa.string()) for name in TEXTS[kind]}
        found = {
            f"{name} is null or empty": pc.equal(pc.utf8_length(text), 0).fill_null(True)
            for name, text in texts.items()
        }
        if kind == "scores":
            score = columns["score"].cast(pa.float64())
            found["score is null"] = pc.is_null(score, nan_is_null=True)
            found["score is not from -1 to 1; divide scores by the highest, such as 5"] = pc.greater(
                pc.abs(score), 1
            ).fill_null(False)
        if kind == "triplets":
            same = pc.equal(texts["negative"], texts["positive"])
            found["negative is the same text as positive"] = same.fill_null(False)
        faults = {fault: rows.to_numpy(zero_copy_only=False) for fault, rows in found.items()}
        return DatasetStatistics(len(places), Counter({kind: len(places)}), faulty_rows(faults, places))

    def fit(self, statistics: DatasetStatistics, types: Mapping[str, pa.DataType]) -> dict[str, Any]:
        """Returns the `kind` of rows."""
        return {"kind": kind_of(set(types))}

    def eval_faults(self, statistics: DatasetStatistics) -> list[str]:
        """Checks that the rows of the evaluation set are of the same kind as those of the training set."""
        kind = self.fitted["kind"]
        return [
            f"train has {kind} ({', '.join(TEXTS[kind])}) and eval has {other}; give both the same columns"
            for other in statistics.labels
            if other != kind
        ]

    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns the task's tokens of each text, `key` (int64, equal for equal texts), and `score` (float32), if any."""
        made, cut = {}, np.zeros(len(places), bool)
        for name in self.texts:
            prompt = self.params.prompts.get("query" if name == "anchor" else "document", "")
            texts = columns[name].to_pylist()
            prompted = pa.array([prompt + text for text in texts], pa.string())
            tokens = self.task.preprocess({"text": prompted}, places)
            for column in tokens.table.column_names:
                made[f"{name}.{column}"] = tokens.table[column]
            made[f"{name}.key"] = pa.array([key_of(text) for text in texts], pa.int64())
            cut |= False if tokens.cut is None else tokens.cut
        if "score" in columns:
            made["score"] = columns["score"].cast(pa.float32())
        return Features(pa.table(made), cut)

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the number of tokens of all texts of each row."""
        return np.sum([list_lengths(features[f"{name}.input_ids"]) for name in self.texts], axis=0)

    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Pads all first texts, then all second ones, into one batch [texts * rows, width], with labels of the rows."""
        import torch

        names = [
            name
            for name in ("input_ids", "token_type_ids")
            if f"{self.texts[0]}.{name}" in features.column_names
        ]
        parts = [pa.table({name: features[f"{text}.{name}"] for name in names}) for text in self.texts]
        rows = pa.concat_tables(parts).combine_chunks()
        batch = self.task.collate(rows, np.arange(len(rows)), 1)
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        return {**tensors, "labels": torch.from_numpy(self._labels(features))}

    def _labels(self, features: pa.Table) -> np.ndarray:
        """Returns scores, float32 [rows], or keys of the texts, int64 [rows, texts]."""
        if self.fitted["kind"] == "scores":
            return features["score"].to_numpy().copy()
        return np.stack([features[f"{name}.key"].to_numpy() for name in self.texts], axis=1)

    def prepare(self, model: Any) -> None:
        """Makes the model return text vectors in place of token vectors; freezes layers that these do not use."""
        model.register_forward_hook(self._join, with_kwargs=True)
        for name, weight in model.named_parameters():
            if any(part in self.task.unused for part in name.split(".")):
                weight.requires_grad = False

    def _join(
        self, model: Any, arguments: tuple[()], inputs: dict[str, torch.Tensor], outputs: Any
    ) -> dict[str, torch.Tensor]:
        """Returns `embedding`, float32 [texts * rows, dimension], for any precision of the model."""
        import torch

        hidden = outputs.last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return {"embedding": self.task.join(hidden, inputs.get("attention_mask"))}

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Computes the mean loss of the groups of a forward pass, each label counted once.

        If the rows of one worker are not whole groups, each worker computes the groups of all, and returns its share.
        """
        from hfbatch.train.recipes.embedding_loss import of_all_workers

        vectors, workers = by_row(outputs["embedding"], len(labels)), 1
        if len(labels) % self.group:
            vectors, labels, workers = of_all_workers(vectors, labels)
        return self._sum(vectors, labels) / workers / items_of(labels, num_items_in_batch)

    def _sum(self, vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from hfbatch.train.recipes.embedding_loss import make_loss, sum_over_groups

        loss = make_loss(self.loss_name(self.fitted["kind"]), self.params.scale, self.params.margin)
        return sum_over_groups(loss, vectors, labels, self.group if self.grouped else max(len(labels), 1))

    def predict(self, model: Any, batch: dict[str, torch.Tensor]) -> Predicted:
        """Returns the vectors of each row's texts, float32 [texts, dimension]; `score` computes the loss of all rows."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        rows = len(batch["labels"])
        return Predicted(list(by_row(model(**inputs)["embedding"], rows).cpu().numpy()), 0.0, rows)

    def score(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, float]:
        """Computes correlations of cosines with scores, or retrieval metrics; and `loss`, with groups in row order."""
        import torch

        vectors, labels = np.stack(predictions), self._labels(features)
        loss = self._sum(torch.from_numpy(vectors), torch.from_numpy(labels)) / labels.size
        first, second = vectors[:, 0], vectors[:, 1]
        if self.fitted["kind"] == "scores":
            found = regression(cosines(first, second), labels)
            return {"loss": float(loss), "pearson": found["pearson"], "spearman": found["spearman"]}
        found = retrieval(first, second, labels[:, 0], labels[:, 1])
        if self.fitted["kind"] == "triplets":
            found["triplet_accuracy"] = triplet_accuracy(first, second, vectors[:, 2])
        return {"loss": float(loss), **found}

    def complete(self, folder: Path) -> None:
        """Writes the files of sentence-transformers, which define pooling for other libraries."""
        from hfbatch.train.recipes.sentence_files import write_sentence_files

        own = self.task.recipe
        default = None if self.params.prompts else own.default_prompt
        write_sentence_files(self.task, folder, {**own.prompts, **self.params.prompts}, default)


def kind_of(present: set[str]) -> str:
    """Returns the kind of rows with these columns: pairs, triplets or scores."""
    if present & {*TEXTS["scores"], "score"}:
        return "scores"
    return "triplets" if "negative" in present else "pairs"


def by_row(vectors: torch.Tensor, rows: int) -> torch.Tensor:
    """Reshapes [texts * rows, dimension], all first texts before all second ones, to [rows, texts, dimension]."""
    return vectors.reshape(-1, rows, vectors.shape[-1]).transpose(0, 1)


def key_of(text: str) -> int:
    """Returns a 63-bit hash of a text, at least 0; different texts collide with probability 1 in 2**63."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
