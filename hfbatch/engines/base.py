"""The engine interface: what tasks may ask of a loaded model, and the two kinds of engines. Does not import Ray.

A batch engine takes padded batches and returns tensors; the task's `forward` runs on it. A row engine takes the rows of a
split as requests and returns each result as soon as it is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hfbatch.errors import HfbatchError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

    from hfbatch.spec.section import Section

PACKED = frozenset(
    (
        *(
            "albert",
            "bert",
            "camembert",
            "data2vec-text",
            "distilbert",
            "electra",
            "ernie",
            "eurobert",
            "gemma",
        ),
        *("gemma3_text", "gte", "jina_embeddings_v3", "llama", "mistral", "modernbert", "nomic_bert", "phi3"),
        *("qwen2", "qwen3", "roberta", "roberta-prelayernorm", "smollm3", "xlm-roberta", "xlm-roberta-xl"),
    )
)
"""Model types whose batches can be packed: their attention is the interface of transformers, and their positions can be given.
Here, since plans do not import torch."""
REMOTE = "remote"
"""In place of a dtype: that of an endpoint's model is not known."""
Forward = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""Maps (model, batch of tensors on the device) to tensors of the same first dimension."""


class DeviceLostError(HfbatchError):
    """The device is unusable for the rest of this process; the work needs a new process."""


class Capability(Enum):
    """What a task may ask of a loaded model. The value completes the sentence "the task needs ..."."""

    FORWARD = "the outputs of the model for padded inputs"
    """A call of the model, and its attributes `config`, `device`, `dtype` and the signature of `forward`."""
    GENERATE = "`generate` of transformers"
    """`generate` for padded inputs, besides FORWARD."""
    COMPLETE = "continuations of prompts"
    """Nothing but new tokens, and their log-probabilities, for prompts of token ids."""
    CONSTRAINED = "a mask of the tokens that params.constraint allows"
    """Texts that satisfy a constraint, besides COMPLETE: by a logits processor, or by means of the engine."""
    ANSWER = "the answers of an endpoint"
    """Answers to requests of the OpenAI API; nothing is known of the model but its name."""
    MODULE = "the PyTorch module of the model"
    """Any attribute or method of a transformers model, such as its hooks or `get_text_features`."""


@dataclass(frozen=True)
class EngineConfig:
    """What an engine loads, and how."""

    folder: str
    """The model's files, safetensors weights among them."""
    auto_class: str
    """The transformers AutoClass that loads the model."""
    dtype: str
    threads: int = 1
    """CPU threads."""
    trust_remote_code: bool = False
    concurrent: bool = True
    """Whether batches may run concurrently."""
    vocabulary: int | None = None
    """Number of tokens that need an embedding, if it may exceed the model's."""
    seed: int = 0
    """Seed of the embeddings of added tokens."""
    unused: tuple[str, ...] = ("pooler",)
    """Names of layers whose weights may be missing."""
    options: Section | None = None
    """The engine's section of the spec."""
    commit: str = ""
    """The Hub commit of the model, or a digest of its files."""
    packages: tuple[str, ...] = ()
    """The engine's packages, whose versions may change results."""
    quantization: str = "none"
    """One of the kind's `quantizations`, or none."""
    graph: str = ""
    """The file in the folder that holds the model as a graph of this engine, if no weights do; `auto` is then a dtype too."""
    compiled: bool = False
    """Whether torch.compile compiles the model."""
    adapter: str = ""
    """Folder of an adapter of the model, if the job runs one."""
    tokenizer: str = ""
    """Folder of the tokenizer, if it is another one."""


class Engine(ABC):
    """A loaded model. Subclasses are built from an EngineConfig alone, and load the model when they are built.

    :raises Exception: if the model cannot be loaded; the job then ends with the message.
    """

    name: ClassVar[str]
    device: str
    """The torch device type with the hardware model: `cuda (NVIDIA H200)`."""
    dtype: str
    model: Any
    """The transformers model, or an object that behaves like it where tasks use it."""

    @classmethod
    def quantization_faults(
        cls, model: PretrainedConfig, auto_class: str, trust_remote_code: bool, quantization: str
    ) -> list[str]:
        """Returns errors for models that the engine cannot quantise. Loads no weights."""
        return []

    @classmethod
    def adapter_faults(cls, model: str, folder: str) -> list[str]:
        """Returns errors for an adapter that the engine cannot run. Loads no weights.

        :param model: name of the adapter, for errors.
        """
        return []

    @abstractmethod
    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether a smaller batch may succeed."""

    @abstractmethod
    def release_memory(self) -> None:
        """Releases cached device memory after an out-of-memory error."""


class BatchEngine(Engine):
    """Runs batches, which are submitted in order and collected in the same order.

    `submit` may return before the device is done, so that the next batch is prepared and copied meanwhile; the
    caller keeps at most `depth` batches in flight.
    """

    depth: int = 1
    parallel: int = 1
    """Number of batches that are computed or copied at the same time; a trial of a batch size runs at least as many."""
    pad_multiple: int = 1
    """Padded lengths are multiples of this; of at most 8 for short batches."""
    packs: bool = False
    """Whether it computes the tokens of a batch without padding."""
    batch_sizes: tuple[int, ...] = (16, 32)
    """Batch sizes that `batch.size: auto` tries."""
    batch_tokens: int | None = 4096
    """Default maximum of tokens in a batch of texts; on CPUs, activations of larger batches exceed the caches."""

    def expect(self, batches: int) -> None:
        """Sets the number of batches of the next split, at least 1."""

    def prepare(self, batch: dict[str, np.ndarray], forward: Forward) -> None:
        """Prepares for batches with the same inputs, before the first one. :raises WorkerError: if the model cannot run."""

    @abstractmethod
    def submit(self, batch: dict[str, np.ndarray], forward: Forward) -> Any:
        """Copies a batch to the device and starts the computation; returns a handle for `collect`."""

    @abstractmethod
    def collect(self, handle: Any) -> dict[str, np.ndarray]:
        """Waits for a batch and returns its results in host memory.

        :raises Exception: an error of the model that submit did not raise.
        """


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: list[int]
    """Token ids, at least one."""
    max_new_tokens: int | None = None
    """Maximum of new tokens, if it differs from that of the generation config."""
    seed: int | None = None
    """Seed of the row, if its tokens are sampled."""
    constraint: Mapping[str, Any] | None = None
    """What the text must be: a value for one of `json`, `regex` and `choice`."""
    grammar: Callable[[], Any] | None = None
    """Returns the constraint, compiled for the tokenizer."""


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt."""

    tokens: list[int]
    """New token ids, up to and including the token that ends the text."""
    stopped: bool
    """Whether the text reached its end before the maximum of tokens."""
    log_probs: list[float] | None = None
    """Log-probability of each new token, if requested."""
    complete: bool | None = None
    """Whether the text satisfies its constraint; None: if it has ended."""


@dataclass(frozen=True)
class Call:
    """A request to an endpoint."""

    path: str
    """Such as /v1/embeddings."""
    body: dict[str, Any]
    read: Callable[[Any], Any]
    """Returns the answer that the body of a response holds, or its item of `data` for a call with a text; raises ValueError if
    it holds none."""
    text: str | None = None
    """The `input`, where the API takes a list of them: calls with the same body may share a request."""


CACHED = "cached_tokens"
"""Tokens of prompts that were not computed again, since another prompt begins with them."""


def token_count(usage: object, name: str) -> int | None:
    """Returns a number of tokens that an answer of an endpoint states; None if it states none that can be.

    :param usage: the answer's `usage`.
    """
    number = usage.get(name) if isinstance(usage, dict) else None
    return number if type(number) is int and 0 <= number < 2**31 else None


def cached_count(usage: object) -> int:
    """Returns how many tokens of the prompt an answer states to have come from a cache; 0 if it does not say."""
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    return token_count(details, CACHED) or 0


def unsupported_options(
    engine: str, generation: GenerationConfig, names: Sequence[str], begin_with: str | None
) -> list[str]:
    """Returns an error for options that are set and that a row engine does not support.

    :param names: of the options in a GenerationConfig.
    :param begin_with: text that every continuation begins with.
    """
    asked = {name: getattr(generation, name, None) for name in names}
    asked = {name: value for name, value in asked.items() if value not in (None, 0, 1, False)}
    if begin_with:
        asked["begin_with"] = begin_with
    if not asked:
        return []
    shown = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    return [
        f"engine {engine} does not support {shown} (of params or the model's generation_config); "
        "set the option to null, 1 or 0, or use engine torch"
    ]


class RowEngine(Engine):
    """Continues prompts, or has an endpoint answer requests; decides itself which of them run concurrently."""

    rows: int
    """Default maximum of concurrent rows."""

    def take_usage(self) -> dict[str, int]:
        """Returns what the engine has counted since the last call, such as tokens that cost; empty for most engines."""
        return {}

    @classmethod
    @abstractmethod
    def option_faults(
        cls, model: PretrainedConfig, generation: GenerationConfig, begin_with: str | None
    ) -> list[str]:
        """Returns errors for models and options that the engine does not support. Loads no weights.

        :param begin_with: text that every continuation begins with.
        """

    @abstractmethod
    def complete(
        self,
        requests: Sequence[Any],
        generation: Any,
        rows: int,
        tokens: int | None = None,
        log_probs: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """Yields the position of each request and its result, in the order in which they finish: a Completion, what `read` of
        a Call returns, or the error of this request alone.

        :param requests: each a Request or, for an endpoint, a Call.
        :param generation: options of all requests; None for calls.
        :param rows: maximum of concurrent rows.
        :param tokens: maximum of tokens in a step of the model; None for the engine's default.
        :param log_probs: whether to compute log-probabilities.
        :raises Exception: the error of a request, or of one that ran concurrently. Requests that were not yielded before
            have no result; the caller runs them again, in smaller calls.
        """
