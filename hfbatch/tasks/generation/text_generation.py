"""Task text-generation: continues prompts and answers chats.

Greedy texts equal those of the transformers pipeline on single rows; sampled texts follow its distribution, with
noise that depends on the row's position, see `sampling`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hfbatch.engines.base import Capability, Completion, Request
from hfbatch.tasks.base import Batch, Example, Features, InputColumn
from hfbatch.tasks.generation.chat import (
    MESSAGE,
    MESSAGES_WANTED,
    ChatParams,
    answered,
    chat_faults,
    is_chat,
    is_tools,
    option_faults,
    render,
)
from hfbatch.tasks.generation.completions import as_outputs
from hfbatch.tasks.generation.constraint import (
    ConstraintSpec,
    Grammar,
    compile_constraint,
    constraint_faults,
    read_tokenizer,
    with_schema,
)
from hfbatch.tasks.generation.generation_config import (
    NOT_FOLLOWED,
    NOT_FOLLOWED_BEHIND_PROMPT,
    GenerationParams,
    generation_notes,
    read_defaults,
    resolve,
)
from hfbatch.tasks.generation.json_values import Column, parser_of
from hfbatch.tasks.generation.prefix import can_share, group_prompts, share
from hfbatch.tasks.generation.text_generation_base import EXTRA_OUTPUTS, GeneratingTask
from hfbatch.tasks.positions import embedding_rows, has_embedding
from hfbatch.tasks.tokens import (
    collate_text,
    flatten,
    length_faults,
    length_limit,
    list_lengths,
    padding_id,
    text_column,
    tokenize,
)

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import GenerationConfig, PreTrainedTokenizerBase

PIPELINE_DEFAULTS = {"do_sample": True, "temperature": 0.7, "top_k": 50}
"""Defaults of the transformers pipeline for options that neither the user nor the model sets."""
TOOLS_WANTED = "JSON or list<struct>, the functions of each chat; read where mapped"
LEFT_OUT = (*NOT_FOLLOWED, *NOT_FOLLOWED_BEHIND_PROMPT)


COUNT_PADDING = frozenset(
    (
        "bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "prophetnet", "trocr",
        "whisper", "xlnet",
    )
)  # fmt: skip
"""Model types whose positions count the padding before a prompt: decoders of encoder-decoders, and XLNet."""


class IncompleteText(ValueError):
    """A text that ended before it satisfied its constraint."""


class TextGeneration(GeneratingTask):
    """Continues each prompt of column `text`, or answers each chat of column `messages`.

    A prompt that leaves no room for `max_new_tokens` within the model's limit, or is longer than
    `batch.max_length`, is truncated from the left, since its end matters most, and counted as truncated; for a chat,
    this applies to the rendered template. An empty prompt starts from the model's bos token; without one, the row
    is rejected. If a chat ends with an assistant message, that message is continued.

    With `constraint`, each token is chosen among those that the constraint allows. A row with a text that reaches
    `max_new_tokens` before it satisfies the constraint is rejected.

    A different batch shape can change logits by a rounding error, and so a token at a near tie; such near ties are
    rare in float32, but not in bfloat16.
    """

    class Params(ChatParams, GenerationParams):
        """Null uses the model's generation_config, then the transformers pipeline's default."""

        return_full_text: bool | None = None
        """Return the prompt or messages followed by the answer (true, also if null), or only the answer."""
        constraint: ConstraintSpec | None = None
        """What the answer must be: {json_schema: ...}, {regex: ...} or {choices: [...]}; see `hfbatch docs tasks`."""

    params: Params
    name = "text-generation"
    aliases = ("conversational",)
    summary = "Continue prompts or answer chats with a causal language model"
    auto_class = "AutoModelForCausalLM"
    outputs: ClassVar[Mapping[str, str]] = {
        "generated_text": "string for prompts; messages for chats, unless return_full_text is false; "
        "a list of them if num_return_sequences is above 1",
        "parsed": "the answer as a value: struct, list, int64, ... as the JSON Schema of params.constraint says; "
        "string for its choices",
        **EXTRA_OUTPUTS,
    }
    inputs = (
        text_column("text", required=False),
        InputColumn("messages", is_chat, MESSAGES_WANTED, required=False, rendered_by="messages"),
        InputColumn("tools", is_tools, TOOLS_WANTED, required=False, by_name=False, nullable=True),
    )
    exclusive = ("text", "messages")
    split_rows = 256
    lasting = ("config", "tokenizer", "model_defaults", "constraint_tokenizer")
    EXAMPLE = Example(
        {"text": ["Every large cluster", "Our nightly job reads the", ""]},
        {"max_new_tokens": 8, "do_sample": False},
    )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, which truncates long prompts from the left."""
        return self.load_tokenizer(truncation_side="left", padding_side="left")

    @cached_property
    def model_defaults(self) -> GenerationConfig:
        """The model's generation settings."""
        return read_defaults(self.model, self.config)

    @cached_property
    def decoding(self) -> GenerationConfig:
        """Decoding options: params, then the model's settings, then the pipeline's defaults."""
        last = {**PIPELINE_DEFAULTS, "max_new_tokens": self._default_new_tokens()}
        resolved = resolve(self.model_defaults, self.params, self.tokenizer, last, LEFT_OUT)
        rows = embedding_rows(self.config, self.vocabulary)
        if not has_embedding(resolved.pad_token_id, rows):
            known = self.tokenizer.pad_token_id
            resolved.pad_token_id = known if has_embedding(known, rows) else None
        return resolved

    def _default_new_tokens(self) -> int:
        limit = length_limit(self.tokenizer, self.config)
        return 256 if limit is None else max(min(256, limit // 2), 1)

    @cached_property
    def prompt_limit(self) -> int | None:
        """Maximum tokens of a prompt: the room within the model's limit, and at most `batch.max_length`."""
        limit = length_limit(self.tokenizer, self.config)
        room = [] if limit is None else [limit - self.decoding.max_new_tokens]
        return min([*room, *([self.max_length] if self.max_length else [])], default=None)

    @property
    def asks(self) -> frozenset[Capability]:
        """Continuations of prompts: of a batch engine through `generate`, of a row engine through `requests`."""
        constrained = {Capability.CONSTRAINED} if self.params.constraint else set()
        return frozenset({Capability.COMPLETE, *constrained})

    @classmethod
    def read_files(cls, params: dict[str, Any]) -> dict[str, Any]:
        """Reads the file of a JSON Schema."""
        return with_schema(params)

    @property
    def packages(self) -> tuple[str, ...]:
        """What constraints need."""
        return ("llguidance",) if self.params.constraint else ()

    @cached_property
    def constraint_tokenizer(self) -> LLTokenizer:
        """The tokenizer, as constraints read it."""
        return read_tokenizer(self.tokenizer, self.decoding)

    @cached_property
    def grammar(self) -> Grammar | None:
        """The constraint of each text."""
        spec = self.params.constraint
        return compile_constraint(spec, self.constraint_tokenizer) if spec else None

    @cached_property
    def parser(self) -> Column | None:
        """Type and parser of column `parsed`, if there is one."""
        return parser_of(self.params.constraint)

    @property
    def pads(self) -> bool:
        """Whether prompts of different lengths may be padded into one batch."""
        return super().pads and self.config.model_type not in COUNT_PADDING

    def check(self) -> list[str]:
        """Returns errors for models that are not causal, contradictory params, and no room for prompts."""
        faults = self.model_faults()
        if faults:
            return faults
        faults = self.generation_faults() + option_faults(self.params)
        special = self.tokenizer.num_special_tokens_to_add()
        limit = length_limit(self.tokenizer, self.config)
        faults += length_faults(self.max_length, self.tokenizer, self.config)
        if self.params.constraint:
            faults += constraint_faults(
                self.params.constraint,
                self.decoding,
                self.params.begin_with,
                lambda: self.constraint_tokenizer,
                self.model.name,
            )
        if limit is not None and limit - self.decoding.max_new_tokens <= special:
            faults.append(
                f"params.max_new_tokens={self.decoding.max_new_tokens} leaves no room for a prompt within the "
                f"model's {limit} tokens; set params.max_new_tokens below {limit - special}"
            )
        return faults

    def model_faults(self) -> list[str]:
        """Returns an error if the model cannot continue texts."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config, name = self.config, self.model.name
        classes = list(getattr(config, "architectures", None) or [])
        shown = ", ".join(classes) or f"model type {config.model_type!r}"
        if getattr(config, "is_encoder_decoder", False):
            return [
                f"model {name!r} ({shown}) is an encoder-decoder, which is text2text-generation; "
                "text-generation takes decoder-only models such as Llama or GPT-2"
            ]
        own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        fits = any(cls.endswith(("ForCausalLM", "LMHeadModel")) or cls == own for cls in classes)
        remote = self.model.trust_remote_code and self.auto_class in (getattr(config, "auto_map", None) or {})
        if fits or remote or (own and not classes):
            return []
        return [
            f"model {name!r} ({shown}) is not a causal language model; choose one that ends in ForCausalLM"
        ]

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns an error unless there is exactly one of `text` and `messages`, and a chat template for messages."""
        if not present & set(self.exclusive):
            return ["input has no prompts and no chats; use --column text=COLUMN or --column messages=COLUMN"]
        if present.issuperset(self.exclusive):
            return [
                "columns 'text' and 'messages' are both in input; "
                "name the one to read: --column text=text or --column messages=messages"
            ]
        if "messages" in present:
            return chat_faults(self.tokenizer, self.model.name, "tools" in present)
        return ["column tools goes with messages; leave it out for prompts"] if "tools" in present else []

    def notes(self) -> list[str]:
        """Returns notes on defaults, and on settings in the model's generation_config that are not followed."""
        found = generation_notes(self.params, self.model_defaults, self.decoding, LEFT_OUT)
        if getattr(self.tokenizer, "response_template", None):
            found.append("replies are kept as plain text; the tokenizer's response_template is not applied")
        return found

    def output_fields(self) -> list[pa.Field]:
        """`generated_text` for prompts."""
        return self.fields_for({"text"})

    def fields_for(self, present: set[str]) -> list[pa.Field]:
        """`generated_text`: string, or list<struct<role, content>> for whole chats; a list if there are several."""
        kind = MESSAGE if "messages" in present and self._full_text else None
        kinds = {"generated_text": pa.string() if kind is None else pa.list_(kind)}
        if self.parser:
            kinds["parsed"] = self.parser[0]
        texts = [(name, kind if self.count == 1 else pa.list_(kind)) for name, kind in kinds.items()]
        return [*(pa.field(name, kind) for name, kind in texts), *self.extra_fields()]

    @property
    def _full_text(self) -> bool:
        return self.params.return_full_text is not False

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes prompts or rendered chats to `input_ids`; adds a `seed` for each row when sampling.

        :raises ValueError: for a chat without messages, roles or content, and an empty prompt without a bos token.
        :raises jinja2.TemplateError: for a chat that the template rejects.
        """
        if "messages" in columns:
            texts, special = render(self.tokenizer, self.params, columns), False
        else:
            texts, special = columns["text"].to_pylist(), True
        made = tokenize(self.tokenizer, texts, None, self.prompt_limit, special)
        table = pa.table({"input_ids": self._start_empty(made.table["input_ids"])})
        return Features(self.seeded(table, places), made.cut)

    def _start_empty(self, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """Adds the bos token to prompts without tokens, as `generate` does."""
        empty = pc.equal(pc.list_value_length(ids), 0)
        if not pc.any(empty).as_py():
            return ids
        start = self.decoding.bos_token_id
        if start is None:
            raise ValueError("the prompt is empty, and the model has no bos_token_id to start from")
        return pc.if_else(empty, pa.scalar([start], ids.type), ids)

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the number of tokens in each prompt."""
        return list_lengths(features["input_ids"])

    def batch_groups(self, features: pa.Table, size: int, caches: bool = False) -> np.ndarray | None:
        """Returns which prompts begin alike, unless nothing is shared."""
        wanted = self.settings.share_prefixes if caches else self.shares
        return group_prompts(flatten(features["input_ids"]), size) if wanted else None

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns `input_ids` and `attention_mask` int64 [batch, width], padded on the left; `seed` int64 [batch].

        Padding follows tokens that all rows share, see `prefix.share`.
        """
        pad = self.decoding.pad_token_id
        pad = padding_id(self.tokenizer, self.config, self.vocabulary) if pad is None else pad
        batch = collate_text(
            features.select(["input_ids"]), rows, pad, multiple, left=True, limit=self.prompt_limit
        )
        if "seed" in features.column_names:
            batch["seed"] = features["seed"].to_numpy()[rows]
        return share(batch) if self.shares else batch

    @cached_property
    def shares(self) -> bool:
        """Whether tokens that all prompts of a batch begin with are read once."""
        return self.settings.share_prefixes and can_share(self.config, self.decoding)

    def requests(self, features: pa.Table) -> list[Request]:
        """Returns the prompt of each row, for a row engine."""
        seeds = features["seed"].to_pylist() if "seed" in features.column_names else [None] * len(features)
        form = self.params.constraint.form if self.params.constraint else None
        grammar = (lambda: self.grammar) if form else None
        prompts = features["input_ids"].to_pylist()
        return [
            Request(prompt, seed=seed, constraint=form, grammar=grammar)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def outputs_of(
        self, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> dict[str, np.ndarray]:
        """Returns the results of a row engine as `forward` returns those of a batch."""
        return as_outputs(requests, completions, self.params.log_probs, self.params.constraint is not None)

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns `generated_text`, after its prompt unless return_full_text is false, and the extra columns.

        :raises IncompleteText: for a row with a text that does not satisfy its constraint.
        :raises NumberOutOfRange: for a row with a number that the type of `parsed` cannot hold.
        """
        texts = pa.array(self.texts(outputs), pa.string())
        if "complete" in outputs.column_names:
            self._check_complete(outputs, texts)
        source = np.repeat(np.arange(len(outputs)), self.count)
        if not self._full_text:
            result = texts
        elif "messages" in columns:
            chats = columns["messages"].to_pylist()
            pairs = zip(source, texts.to_pylist(), strict=True)
            result = pa.array(
                [answered(self.params, chats[row], text) for row, text in pairs], pa.list_(MESSAGE)
            )
        else:
            prompts = columns["text"].cast(pa.string()).take(pa.array(source))
            result = pc.binary_join_element_wise(prompts, texts, "")
        return [self.grouped(result), *self._parsed(outputs), *self.extra_columns(outputs)]

    def _check_complete(self, outputs: pa.Table, texts: pa.Array) -> None:
        cut = pc.invert(flatten(outputs["complete"]).flatten())
        if pc.any(cut).as_py():
            text = texts[pc.index(cut, True).as_py()].as_py()
            raise IncompleteText(
                "the text ended before it satisfied params.constraint; is params.max_new_tokens="
                f"{self.decoding.max_new_tokens} enough? {text}"
            )

    def _parsed(self, outputs: pa.Table) -> list[pa.Array]:
        if not self.parser:
            return []
        kind, parse = self.parser
        # Some tokenizers remove spaces before punctuation, which may be within a JSON string.
        texts = self.texts(outputs, clean_up_tokenization_spaces=False)
        return [self.grouped(pa.array([parse(text) for text in texts], kind))]
