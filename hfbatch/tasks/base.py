"""What a task is: the contract between columns, features and output columns. Knows nothing of Ray and of files.

A split's rows pass through one task object in three places:

    preprocess    CPU     columns  -> features       one row each, ragged Arrow lists
    forward       device  batch    -> tensors        padded arrays made by collate, first dimension the batch
    postprocess   CPU     tensors  -> output columns

The same object can be built anywhere from `(model, params, max_length, seed)`; its tokenizer and config load
when they are first used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.media_files import RowFiles
from hfbatch.spec import BatchSpec, Section, TokenizerSpec
from hfbatch.tasks.parts.positions import embedding_rows
from hfbatch.tasks.parts.vocabulary import check_vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from hfbatch.data.models import Model

SEE_PADDING = frozenset(
    (
        "big_bird", "bigbird_pegasus", "canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer",
        "perceiver", "recurrent_gemma", "rwkv", "xlstm", "yoso",
    )
)  # fmt: skip
"""Types of models whose answers padding changes, whatever the attention mask says: they convolve, pool or mix tokens,
carry a state through them, or go by the length of the batch."""
FINITE = "finite"
"""An output of forward that the predictor takes for itself, bool [batch]: whether numbers that forward computed and
does not return, such as the logits that tokens are chosen by, were finite."""
Batch = dict[str, Any]
"""NumPy arrays, which go to the device; anything else stays on the host."""


class Params(Section):
    """Base of a task's options; each field's docstring is its help."""


@dataclass(frozen=True)
class InputColumn:
    """A column that a task reads."""

    name: str
    accepts: Callable[[pa.DataType], bool]
    """Whether an Arrow type will do."""
    wants: str
    """The accepted types in words, for errors and help."""
    required: bool = True
    by_name: bool = True
    """Whether a dataset column of this name is read without being mapped to it."""
    nullable: bool = False
    """Whether a null is a value; elsewhere its row is rejected."""
    files: bool = False
    """Whether its values may name files."""


@dataclass(frozen=True)
class Features:
    """Rows made ready for the device."""

    table: pa.Table
    """One row for each input row, in input order: `input_ids` and the like as list<int32>."""
    cut: np.ndarray | None = None
    """Which rows were cut to the length limit, bool [rows]; None for none of them."""

    @property
    def truncated(self) -> int:
        """How many rows were cut to the length limit."""
        return 0 if self.cut is None else int(self.cut.sum())


@dataclass(frozen=True)
class Histogram:
    """Which number of each prediction the report draws."""

    name: str
    edges: tuple[float, ...]
    """Bin edges; values outside are counted in the outermost bins."""


@dataclass(frozen=True)
class Example:
    """A small input that documents the task and feeds its tests."""

    rows: Mapping[str, list[Any]]
    params: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """One thing to do with each row, such as `embedding`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `hfbatch tasks`."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names that the task goes by."""
    general: ClassVar[bool] = True
    """Whether a model's class tells `task: auto` this task; False for special uses of models of another one."""
    takes: ClassVar[frozenset[str]] = frozenset({"text"})
    """Of what a model without a head must read something, to do the task: text, image, audio, video."""
    auto_class: str
    """The transformers AutoClass that loads the model."""
    inputs: ClassVar[tuple[InputColumn, ...]]
    outputs: ClassVar[Mapping[str, str]]
    """Output columns and their types in words, for help."""
    exclusive: ClassVar[tuple[str, ...]] = ()
    """Inputs of which exactly one is read; one that the spec maps goes before one found by its name."""
    Params: ClassVar[type[Params]] = Params
    split_rows: ClassVar[int] = 8192
    """Rows of a split, unless the spec says: large enough to sort by length, small enough to lose."""
    histogram: ClassVar[Histogram]
    concurrent: bool = True
    """Whether a CPU does best with one batch on each core; False where a batch takes many small steps."""
    whole_texts: ClassVar[bool] = False
    """Whether a batch is one pass over texts, so that its tokens are what it costs."""
    ragged: ClassVar[Mapping[str, str]] = {}
    """Outputs whose second dimension differs from row to row, and the output that holds its length."""
    windows: ClassVar[tuple[str, ...]] = ()
    """Features with a list for each row, an item for each of its windows, of which there is at least one.

    Windows are what a task batches whose rows may take several calls of the model, such as pieces of a long
    text: collate and forward see windows of all rows side by side, and postprocess gets a list for each row.
    """
    finite: ClassVar[bool] = True
    """Whether a row for which forward returns NaN or infinity is a reject; False where they are proper answers."""
    carried: ClassVar[tuple[str, ...]] = ()
    """Features that postprocess reads beside what forward returned."""
    EXAMPLE: ClassVar[Example]

    def __init__(self, model: Model, params: Any, max_length: int | None = None, seed: int = 0) -> None:
        self.model = model
        self.params = params
        self.max_length = max_length
        self.seed = seed
        self.files = RowFiles()
        """The files that rows may name."""
        self.batch = BatchSpec()
        """How rows are batched, for tasks that have a part in it."""
        self.tokenizer_changes = TokenizerSpec()
        self.added_tokens = 0
        """How many tokens these changes added; known once the tokenizer is loaded."""

    @classmethod
    def params_of(cls, name: str) -> dict[str, Any] | None:
        """The params that a name of the task stands for; None for a name that is not one of its own."""
        return {} if name in (cls.name, *cls.aliases) else None

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's config; no weights are read."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.model.folder, trust_remote_code=self.model.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.load_tokenizer()

    def load_tokenizer(self, **options: Any) -> PreTrainedTokenizerBase:
        """The model's tokenizer with the changes that the spec asks for.

        :param options: further arguments of `AutoTokenizer.from_pretrained`.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            self.model.folder, trust_remote_code=self.model.trust_remote_code, **options
        )
        check_vocabulary(tokenizer, self.model.folder)
        before = len(tokenizer)
        change_tokenizer(tokenizer, self.tokenizer_changes)
        self.added_tokens = len(tokenizer) - before
        return tokenizer

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model needs embeddings for, where the spec adds some; else None."""
        if self.tokenizer_changes == TokenizerSpec():
            return None
        size = len(self.tokenizer)
        return size if self.added_tokens else None

    @cached_property
    def embedded(self) -> int | None:
        """How many token ids the model has embeddings for; None where its config does not tell."""
        return embedding_rows(self.config, self.vocabulary)

    @cached_property
    def not_embedded(self) -> dict[int, str]:
        """Tokens of the tokenizer that the model has no embedding for, by id."""
        if self.embedded is None:
            return {}
        return {
            number: token for token, number in self.tokenizer.get_vocab().items() if number >= self.embedded
        }

    @property
    def pads(self) -> bool:
        """Whether rows of different lengths may share a batch."""
        return self.config.model_type not in SEE_PADDING

    def check(self) -> list[str]:
        """What keeps this model and these params from doing the task; called once, before work starts."""
        return []

    def continuous_faults(self) -> list[str]:
        """What keeps the task from `batch.continuous`; called once, before work starts, where the spec has it."""
        return [f"batch.continuous is for text-generation; leave it out for task {self.name}"]

    def columns(self) -> tuple[InputColumn, ...]:
        """Those of `inputs` that the task reads with this model."""
        return self.inputs

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of layers that the task has no use for, so that their weights may be missing."""
        return ("pooler",)

    def column_faults(self, present: set[str]) -> list[str]:
        """What is wrong with the set of task inputs that the dataset has, beyond required ones that lack.

        :param present: names of task inputs that are mapped or found.
        """
        return []

    def notes(self) -> list[str]:
        """Choices made for the user that the plan should say."""
        return []

    @abstractmethod
    def output_fields(self) -> list[pa.Field]:
        """Names and types of the output columns, from the config alone."""

    def fields_for(self, present: set[str]) -> list[pa.Field]:
        """`output_fields()`; overridden where the types depend on which optional inputs there are.

        :param present: names of task inputs that are mapped or found.
        """
        return self.output_fields()

    @abstractmethod
    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Turns input columns, none of which holds a null, into features.

        :param columns: task input name to array, all of one length.
        :param places: `file` (string) and `row` (int64) of each row: where it comes from in the input.
        :raises Exception: whatever is wrong with a row; the caller then finds the row and rejects it.
        """

    @abstractmethod
    def lengths(self, features: pa.Table) -> np.ndarray:
        """The cost of each row that padding depends on, int64 [rows]: its number of tokens, for text.

        :param features: rows, or windows apart from each other.
        """

    @abstractmethod
    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Gathers rows, or windows apart from each other, into padded arrays.

        :param rows: positions in features, int64 [batch].
        :param multiple: the padded length is a multiple of this.
        """

    def padded_size(self, batch: Batch) -> int:
        """What the device computes for a batch, padding included, in the unit of `lengths`."""
        return int(batch["input_ids"].size) if "input_ids" in batch else len(next(iter(batch.values())))

    @abstractmethod
    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the model on a batch that is on its device. Runs under inference_mode.

        :returns: tensors of first dimension batch; ragged ones padded on the right. A row with NaN or infinity in
            them, or without `FINITE` where that is among them, is rejected, see `Task.finite`.
        """

    def probe(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What stands for forward when batch sizes are compared; overridden where forward takes long."""
        return self.forward(model, batch)

    @abstractmethod
    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Turns what forward returned, one row for each input row in input order, into `output_fields()`.

        :param outputs: a column for each output, of lists over a row's windows where there are any, and `carried`.
        :param columns: the task's input columns of the same rows.
        """

    @abstractmethod
    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """The number of each row that `histogram` counts, float [rows].

        :param outputs: what forward returned.
        :param columns: what postprocess made of it, of the same rows or fewer.
        """


def change_tokenizer(tokenizer: PreTrainedTokenizerBase, changes: TokenizerSpec) -> None:
    """Makes changes to a tokenizer; tokens that it has already keep their ids."""
    if changes.special_tokens:
        tokenizer.add_special_tokens(dict(changes.special_tokens))
    tokenizer.add_tokens(list(changes.add_special_tokens), special_tokens=True)
    tokenizer.add_tokens(list(changes.add_tokens))
    tokenizer.truncation_side = changes.truncation_side or tokenizer.truncation_side
    tokenizer.padding_side = changes.padding_side or tokenizer.padding_side


def no_embedding(task: Task, token: int) -> str:
    """Why a row with a token beyond the model's embeddings is rejected."""
    name = task.not_embedded.get(token)
    return f"token {name!r} has id {token}, and the model has embeddings for {task.embedded} tokens alone"
