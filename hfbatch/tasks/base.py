"""The task interface: columns to features, features to output columns. Does not import Ray.

The rows of a split pass through three methods of one task:

    preprocess    CPU     columns  -> features       one row each, ragged Arrow lists
    forward       device  batch    -> tensors        padded arrays from collate, batch dimension first
    postprocess   CPU     tensors  -> output columns

A task can be built in any process from its `TaskConfig` and never changes afterwards; its tokenizer and the model's
config load when they are first used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from hfbatch.data.media_files import RowFiles
from hfbatch.engines.base import Capability
from hfbatch.spec.job import TokenizerSpec
from hfbatch.spec.prompts import with_rendering
from hfbatch.spec.section import Section
from hfbatch.tasks.agreement import Agreement, Comparison
from hfbatch.tasks.positions import SEE_PADDING, embedding_rows
from hfbatch.tasks.vocabulary import change_tokenizer, check_vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from hfbatch.hub.models import Model

FINITE = "finite"
"""An output of forward that the predictor consumes, bool [batch]: whether intermediate values that forward does not
return, such as the logits from which tokens are chosen, were finite."""
Batch = dict[str, Any]
"""NumPy arrays, which are copied to the device; other values stay on the host."""


class Params(Section):
    """Base class of a task's options; the docstring of a field is its help text."""


@dataclass(frozen=True)
class InputColumn:
    """An input column of a task."""

    name: str
    accepts: Callable[[pa.DataType], bool]
    """Returns whether an Arrow type is accepted."""
    wants: str
    """Describes the accepted types in errors and help."""
    required: bool = True
    by_name: bool = True
    """Whether a dataset column of the same name is read without an explicit mapping."""
    nullable: bool = False
    """Whether nulls are valid; otherwise a row with a null is rejected."""
    files: bool = False
    """Whether values may be file paths."""
    rendered_by: str = ""
    """The param of `spec.prompts.RENDERING` with which a spec may give templates in place of a column."""


@dataclass(frozen=True)
class Features:
    """Preprocessed rows."""

    table: pa.Table
    """One row per input row, in input order: columns such as `input_ids` as list<int32>."""
    cut: np.ndarray | None = None
    """Which rows were truncated to the length limit, bool [rows]; None if none was."""

    @property
    def truncated(self) -> int:
        """Number of rows truncated to the length limit."""
        return 0 if self.cut is None else int(self.cut.sum())


@dataclass(frozen=True)
class Histogram:
    """The value of each prediction that the report plots as a histogram."""

    name: str
    edges: tuple[float, ...]
    """Bin edges; values outside are counted in the first or last bin."""


@dataclass(frozen=True)
class Example:
    """A small input for the task's documentation and tests."""

    rows: Mapping[str, list[Any]]
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskConfig:
    """The settings from which a task is built."""

    model: Model
    params: Any
    """An instance of the task's `Params`."""
    max_length: int | None = None
    """Maximum tokens of a row; None for the model's limit."""
    seed: int = 0
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    """Changes to the model's tokenizer."""
    files: RowFiles = field(default_factory=RowFiles)
    """Opens the files that rows refer to."""
    fitted: Mapping[str, Any] | None = None
    """What `Task.fit` has returned; None before that, and for tasks that fit nothing."""
    share_prefixes: bool = False
    """Whether tokens that all prompts of a batch begin with are read once, where the model allows it."""


class Task(ABC):
    """An inference task that processes each row, such as `embedding`.

    A task is immutable, except for values that it computes from its settings and caches.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One-line description for `hfbatch tasks`."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names of the task."""
    general: ClassVar[bool] = True
    """Whether `task: auto` may infer this task from a model's class; False if its models are made for another task."""
    takes: ClassVar[frozenset[str]] = frozenset({"text"})
    """Modalities (text, image, audio, video), of which a model without a head must read at least one."""
    auto_class: str
    """The transformers AutoClass that loads the model."""
    inputs: ClassVar[tuple[InputColumn, ...]]
    outputs: ClassVar[Mapping[str, str]]
    """Output columns and descriptions of their types, for help."""
    exclusive: ClassVar[tuple[str, ...]] = ()
    """Inputs of which exactly one is read; a mapped input takes precedence over one found by its name."""
    Params: ClassVar[type[Params]] = Params
    split_rows: ClassVar[int] = 8192
    """Default number of rows in a split: enough to sort by length, few enough to recompute after a failure."""
    histogram: ClassVar[Histogram]
    concurrent: bool = True
    """Whether a CPU is fastest with one batch on each core; False where a batch takes many small steps."""
    whole_texts: ClassVar[bool] = False
    """Whether a batch is one forward pass over texts, so that its cost is its number of tokens."""
    reads_masked: bool = False
    """Whether it reads what the model computes for tokens that the attention mask hides."""
    ragged: ClassVar[Mapping[str, str]] = {}
    """Maps outputs whose second dimension varies by row to the output that holds its length."""
    windows: tuple[str, ...] = ()
    """Features that hold a list per row with one item per window, at least one.

    Tasks whose rows may need several model calls, such as the pieces of a long text, batch windows instead of
    rows: collate and forward process windows of different rows together, and postprocess gets a list per row.
    """
    finite: ClassVar[bool] = True
    """Whether a row is rejected when forward returns NaN or infinity for it; False where these are valid outputs."""
    agreement: ClassVar[Agreement | None] = None
    """How outputs in lowered precision are compared with those in float32; None: they are not, unless by `compare_models`."""
    carried: ClassVar[tuple[str, ...]] = ()
    """Features that postprocess reads in addition to the outputs of forward."""
    lasting: ClassVar[tuple[str, ...]] = ("config",)
    """Cached properties that do not depend on params."""
    EXAMPLE: ClassVar[Example]

    def __init_subclass__(cls) -> None:
        """Adds the params that render an input of the task, see `InputColumn.rendered_by`."""
        super().__init_subclass__()
        asked = {column.rendered_by for column in getattr(cls, "inputs", ())}
        cls.Params = with_rendering(cls.Params, asked)

    def __init__(self, config: TaskConfig) -> None:
        self.settings = config
        self.model = config.model
        self.params = config.params
        self.max_length = config.max_length
        self.seed = config.seed
        self.files = config.files
        self.tokenizer_changes = config.tokenizer

    @classmethod
    def params_of(cls, name: str) -> dict[str, Any] | None:
        """Returns the params that a name of the task implies; None if the name is not one of this task."""
        return {} if name in (cls.name, *cls.aliases) else None

    @classmethod
    def read_files(cls, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the params of a spec with the content of files that they name; called once, where the job is planned.

        :raises SpecError: if a file cannot be read.
        """
        return params

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that these params need besides those of the engine, whose versions may change results."""
        return ()

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's config; loading it reads no weights."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.model.folder, trust_remote_code=self.model.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.load_tokenizer()

    def load_tokenizer(self, changed: bool = True, **options: Any) -> PreTrainedTokenizerBase:
        """Loads the model's tokenizer and applies the changes in the spec.

        :param changed: whether to apply the changes.
        :param options: further arguments of `AutoTokenizer.from_pretrained`.
        """
        from transformers import AutoTokenizer

        folder = self.model.tokenizer_folder
        if folder != self.model.folder:  # that of an adapter, which has no config
            options = {"config": self.config, **options}
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=self.model.trust_remote_code, **options
        )
        check_vocabulary(tokenizer, folder)
        if changed:
            change_tokenizer(tokenizer, self.tokenizer_changes)
        return tokenizer

    @cached_property
    def added_tokens(self) -> int:
        """Number of tokens that the spec adds to the tokenizer."""
        if self.tokenizer_changes == TokenizerSpec():
            return 0
        return len(self.tokenizer) - len(self.load_tokenizer(changed=False))

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that need an embedding if the spec adds tokens; else None."""
        return len(self.tokenizer) if self.added_tokens else None

    @cached_property
    def embedded(self) -> int | None:
        """Number of token ids with an embedding; None if the config does not specify it."""
        return embedding_rows(self.config, self.vocabulary)

    @cached_property
    def not_embedded(self) -> dict[int, str]:
        """Tokens of the tokenizer without an embedding in the model, by id."""
        if self.embedded is None:
            return {}
        return {
            number: token for token, number in self.tokenizer.get_vocab().items() if number >= self.embedded
        }

    @property
    def own_agreement(self) -> Agreement | None:
        """`agreement`, in the form that suits this model and these params."""
        return self.agreement

    @property
    def compared(self) -> Task:
        """The task whose output columns are compared between precisions of the model: this one, or it without rounding."""
        return self

    @property
    def fits(self) -> bool:
        """Whether `postprocess` needs values from `fit` that this task does not have yet."""
        return False

    def fit(self, outputs: pa.Table) -> dict[str, Any]:
        """Returns what `postprocess` needs from rows of the job, in plain values that then hold for all of its rows.

        :param outputs: as in `postprocess`, for some rows.
        """
        return {}

    def changed(self, **settings: Any) -> Self:
        """Returns this task with other settings, see TaskConfig; what is loaded and does not depend on params is kept."""
        made = type(self)(replace(self.settings, **settings))
        made.__dict__.update({name: value for name, value in vars(self).items() if name in self.lasting})
        return made

    @property
    def pads(self) -> bool:
        """Whether rows of different lengths may be padded into one batch."""
        return self.config.model_type not in SEE_PADDING

    @property
    def asks(self) -> frozenset[Capability]:
        """What the task needs of an engine, with this model and these params."""
        return frozenset({Capability.FORWARD})

    def check(self) -> list[str]:
        """Returns errors in the combination of model and params; called once, before the job starts."""
        return []

    def columns(self) -> tuple[InputColumn, ...]:
        """Returns the inputs that the task reads with this model."""
        return self.inputs

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of layers that the task does not use, whose weights may be missing."""
        return ("pooler",)

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns errors in the set of task inputs, other than missing required ones.

        :param present: names of task inputs that are mapped or found.
        """
        return []

    def notes(self) -> list[str]:
        """Returns notes for the plan on defaults chosen for the user."""
        return []

    @abstractmethod
    def output_fields(self) -> list[pa.Field]:
        """Returns names and types of the output columns. Reads the config only."""

    def fields_for(self, present: set[str]) -> list[pa.Field]:
        """Returns `output_fields()`; overridden where types depend on the optional inputs present.

        :param present: names of task inputs that are mapped or found.
        """
        return self.output_fields()

    @abstractmethod
    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Turns input columns, which contain no nulls, into features.

        :param columns: task input name to array, all of one length.
        :param places: `file` (string) and `row` (int64) of each row: its position in the input.
        :raises Exception: for an invalid row; the caller then finds the row and rejects it.
        """

    @abstractmethod
    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the length by which rows are padded, int64 [rows]: for text, the number of tokens.

        :param features: rows, or single windows.
        """

    def batch_groups(self, features: pa.Table, size: int, caches: bool = False) -> np.ndarray | None:
        """Returns the group of each row, int64 [rows]; None: all are one. :param caches: whether the engine keeps beginnings."""
        return None

    @abstractmethod
    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Gathers rows, or single windows, into padded arrays.

        :param rows: positions in features, int64 [batch].
        :param multiple: the padded length is a multiple of this.
        """

    def padded_size(self, batch: Batch) -> int:
        """Returns the size of a batch including padding, in the unit of `lengths`."""
        return int(batch["input_ids"].size) if "input_ids" in batch else len(next(iter(batch.values())))

    @abstractmethod
    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the model on a batch that is on its device. Called under inference_mode.

        :returns: tensors with the batch dimension first; ragged ones padded on the right. A row is rejected if they
            hold NaN or infinity for it, or if `FINITE` is returned and false for it; see `Task.finite`.
        """

    def trial_forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replaces forward in batch size trials; overridden where forward is slow."""
        return self.forward(model, batch)

    def compare_models(self, reference: Any, model: Any, features: pa.Table) -> Comparison | None:
        """Compares a model in lowered precision with the same in float32; None: their output columns are to be compared.

        :param features: rows, without the column of positions.
        """
        return None

    @abstractmethod
    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Turns the outputs of forward, one row per input row in input order, into `output_fields()`.

        :param outputs: a column per output, which holds lists over windows if the task has any, and `carried`.
        :param columns: the task's input columns for the same rows.
        """

    @abstractmethod
    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the value of each row that `histogram` counts, float [rows].

        :param outputs: the outputs of forward.
        :param columns: the result of postprocess, for the same rows or fewer.
        """
