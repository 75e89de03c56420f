"""`text-generation`: a prompt or a chat to its continuation. Knows nothing of Ray and of files.

Greedy texts are those of the transformers pipeline on single rows; sampled ones have its distribution, but draw
on noise that depends on the row's place, see `sampling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from hfbatch.tasks import base
from hfbatch.tasks.base import Batch, Example, Features, Histogram, InputColumn, Task
from hfbatch.tasks.parts.decoding import SAMPLING_ONLY, generate, not_followed, read_defaults, resolve
from hfbatch.tasks.parts.text import (
    collate_text,
    is_text,
    length_faults,
    length_limit,
    list_lengths,
    padding_id,
    text_column,
    tokenize,
)

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
PROBE_TOKENS = 8
"""New tokens of each row when batch sizes are compared."""


def is_chat(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds lists of messages with a role and a content."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_struct(kind.value_type):
        return False
    return all(
        kind.value_type.get_field_index(name) >= 0 and is_text(kind.value_type.field(name).type)
        for name in ("role", "content")
    )


class TextGeneration(Task):
    """Continues each prompt of column `text`, or answers each chat of column `messages`.

    A prompt that leaves no room for `max_new_tokens` within the model's limit, or is longer than
    `batch.max_length`, loses tokens from the left, since its end matters most, and is counted as truncated; a chat
    loses the beginning of its rendered template. An empty prompt starts from the model's bos token; without one,
    the row is rejected. A chat that ends with an assistant message has that message continued.

    A batch of another shape can shift a logit by a rounding error, and with it a token at a tie; in float32 ties
    that close are rare, in bfloat16 they are not.
    """

    class Params(base.Params):
        """A null takes the model's generation_config, then the transformers pipeline's default."""

        max_new_tokens: int | None = Field(default=None, ge=1)
        """Most tokens to generate for a row; at last 256, or half of the model's limit where that is less."""
        do_sample: bool | None = None
        """Draw each token at random (true) or take the likeliest (false); at last true."""
        temperature: float | None = Field(default=None, gt=0)
        """Divides the logits before sampling; at last 0.7."""
        top_k: int | None = Field(default=None, ge=0)
        """Sample among the k likeliest tokens, 0 for all; at last 50."""
        top_p: float | None = Field(default=None, gt=0, le=1)
        """Sample among the likeliest tokens that together reach this probability; at last 1."""
        repetition_penalty: float | None = Field(default=None, gt=0)
        """Above 1, makes tokens that the text already has less likely; at last 1."""
        num_return_sequences: int = Field(default=1, ge=1)
        """Sampled continuations of each row; above 1, `generated_text` is a list."""
        return_full_text: bool | None = None
        """Keep what was asked, prompt or messages, before the answer (true, also if null), or the answer alone."""

    name = "text-generation"
    aliases = ("conversational",)
    summary = "Continue prompts or answer chats with a causal language model"
    auto_class = "AutoModelForCausalLM"
    outputs: ClassVar[Mapping[str, str]] = {
        "generated_text": "string for prompts; messages for chats, unless return_full_text is false; "
        "a list of them if num_return_sequences is above 1"
    }
    inputs = (
        text_column("text", required=False),
        InputColumn("messages", is_chat, "list<struct<role: string, content: string>>", required=False),
    )
    exclusive = ("text", "messages")
    split_rows = 256
    concurrent = False
    histogram = Histogram("new_tokens", tuple(float(2**k) for k in range(16)))
    ragged: ClassVar[Mapping[str, str]] = {"tokens": "length"}
    EXAMPLE = Example(
        {"text": ["Every large cluster", "Our nightly job reads the", ""]},
        {"max_new_tokens": 8, "do_sample": False},
    )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, which cuts long prompts from the left."""
        return self.load_tokenizer(truncation_side="left", padding_side="left")

    @cached_property
    def model_defaults(self) -> GenerationConfig:
        """The model's own generation settings."""
        return read_defaults(self.model, self.config)

    @cached_property
    def decoding(self) -> GenerationConfig:
        """How rows are decoded: params, then the model's settings, then the pipeline's defaults."""
        chosen = self.params.model_dump(
            exclude={"num_return_sequences", "return_full_text"}, exclude_none=True
        )
        resolved = resolve(self.model_defaults, chosen, self._default_new_tokens())
        if resolved.pad_token_id is None or resolved.pad_token_id < 0:
            resolved.pad_token_id = self.tokenizer.pad_token_id
        return resolved

    def _default_new_tokens(self) -> int:
        limit = length_limit(self.tokenizer, self.config)
        return 256 if limit is None else max(min(256, limit // 2), 1)

    @cached_property
    def prompt_limit(self) -> int | None:
        """Most tokens of a prompt: what the model's limit leaves, and not more than `batch.max_length`."""
        limit = length_limit(self.tokenizer, self.config)
        room = [] if limit is None else [limit - self.decoding.max_new_tokens]
        return min([*room, *([self.max_length] if self.max_length else [])], default=None)

    def check(self) -> list[str]:
        """Refuses models that are not causal, params that contradict each other, and prompts without room."""
        faults = self._model_faults()
        if faults:
            return faults
        sampling = bool(self.decoding.do_sample)
        idle = [name for name in SAMPLING_ONLY if getattr(self.params, name) is not None]
        if idle and not sampling:
            faults.append(
                f"params: {', '.join(idle)} only work when sampling; set params.do_sample=true or leave out"
            )
        if self.params.num_return_sequences > 1 and not sampling:
            faults.append(
                f"params.num_return_sequences={self.params.num_return_sequences} would return equal texts, since "
                "nothing is sampled; set params.do_sample=true or num_return_sequences=1"
            )
        if sampling and not self.decoding.temperature > 0:
            faults.append(
                f"the model's generation_config samples with temperature {self.decoding.temperature}; "
                "set params.temperature, or params.do_sample=false"
            )
        special = self.tokenizer.num_special_tokens_to_add()
        limit = length_limit(self.tokenizer, self.config)
        faults += length_faults(self.max_length, self.tokenizer, self.config)
        if limit is not None and limit - self.decoding.max_new_tokens <= special:
            faults.append(
                f"params.max_new_tokens={self.decoding.max_new_tokens} leaves no room for a prompt within the "
                f"model's {limit} tokens; set params.max_new_tokens below {limit - special}"
            )
        return faults

    def _model_faults(self) -> list[str]:
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
        """Exactly one of `text` and `messages` has to be there, and a chat template for messages."""
        if not present:
            return ["input has no prompts and no chats; use --column text=COLUMN or --column messages=COLUMN"]
        if len(present) > 1:
            return [
                "columns 'text' and 'messages' are both in input; "
                "name the one to read: --column text=text or --column messages=messages"
            ]
        if "messages" in present and not self.tokenizer.chat_template:
            return [
                f"model {self.model.name!r} has no chat template, so it cannot read messages; "
                "choose an instruct model, or give prompts with --column text=COLUMN"
            ]
        return []

    def notes(self) -> list[str]:
        """What the user left open, and what of the model's generation_config is not followed."""
        found, config = [], self.decoding
        if config.do_sample and self.params.do_sample is None:
            found.append(
                f"samples with temperature {config.temperature:g}, as the model's generation_config or the "
                "transformers pipeline does by default; params.do_sample=false takes the likeliest token"
            )
        if self.params.max_new_tokens is None:
            found.append(f"generates up to {config.max_new_tokens} tokens a row (params.max_new_tokens)")
        ignored = not_followed(self.model_defaults)
        if ignored:
            shown = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
            found.append(f"not followed from the model's generation_config: {shown}")
        if getattr(self.tokenizer, "response_template", None):
            found.append("replies are kept as plain text; the tokenizer's response_template is not applied")
        return found

    def output_fields(self) -> list[pa.Field]:
        """`generated_text` of prompts."""
        return self.fields_for({"text"})

    def fields_for(self, present: set[str]) -> list[pa.Field]:
        """`generated_text`: string, or list<struct<role, content>> for whole chats; a list of them for several."""
        kind = MESSAGE if "messages" in present and self._full_text else None
        kind = pa.string() if kind is None else pa.list_(kind)
        return [pa.field("generated_text", kind if self.params.num_return_sequences == 1 else pa.list_(kind))]

    @property
    def _full_text(self) -> bool:
        return self.params.return_full_text is not False

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Prompts or rendered chats to `input_ids`, and a `seed` for each row when sampling.

        :raises ValueError: for a chat without messages, roles or content, and an empty prompt without bos token.
        :raises jinja2.TemplateError: for a chat that the template refuses.
        """
        if "messages" in columns:
            texts, special = self._render(columns["messages"]), False
        else:
            texts, special = columns["text"].to_pylist(), True
        made = tokenize(self.tokenizer, texts, None, self.prompt_limit, special)
        table = pa.table({"input_ids": self._start_empty(made.table["input_ids"])})
        if self.decoding.do_sample:
            from hfbatch.tasks.parts.sampling import row_seeds

            table = table.append_column("seed", pa.array(row_seeds(self.seed, places), pa.int64()))
        return Features(table, made.cut)

    def _render(self, messages: pa.Array) -> list[str]:
        """Each chat as the template writes it; one that ends with the assistant stays open."""
        _check_messages(messages)
        chats = messages.to_pylist()
        prefilled = np.array([chat[-1]["role"] == "assistant" for chat in chats], bool)
        texts = np.empty(len(chats), object)
        for prefill in (False, True):
            rows = np.flatnonzero(prefilled == prefill)
            if len(rows):
                texts[rows] = self.tokenizer.apply_chat_template(
                    [chats[row] for row in rows],
                    tokenize=False,
                    add_generation_prompt=not prefill,
                    continue_final_message=prefill,
                )
        return texts.tolist()

    def _start_empty(self, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """Puts the bos token into prompts that have no token at all, as `generate` does."""
        empty = pc.equal(pc.list_value_length(ids), 0)
        if not pc.any(empty).as_py():
            return ids
        start = self.decoding.bos_token_id
        if start is None:
            raise ValueError("the prompt is empty, and the model has no bos_token_id to start from")
        return pc.if_else(empty, pa.scalar([start], ids.type), ids)

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Tokens of each prompt."""
        return list_lengths(features["input_ids"])

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """`input_ids` and `attention_mask` int64 [batch, width], padded on the left; `seed` int64 [batch]."""
        pad = self.decoding.pad_token_id
        pad = padding_id(self.tokenizer, self.config) if pad is None else pad
        batch = collate_text(
            features.select(["input_ids"]), rows, pad, multiple, left=True, limit=self.prompt_limit
        )
        if "seed" in features.column_names:
            batch["seed"] = features["seed"].to_numpy()[rows]
        return batch

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Generates until each row has met an eos token or max_new_tokens, see `decoding.generate`."""
        return generate(model, batch, self.decoding, self.params.num_return_sequences)

    def probe(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Generates the first few tokens."""
        return generate(model, batch, self.decoding, self.params.num_return_sequences, PROBE_TOKENS)

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """`generated_text`, with what was asked before it unless return_full_text is false."""
        count = self.params.num_return_sequences
        texts = pa.array(self._decode(outputs), pa.string())
        source = np.repeat(np.arange(len(outputs)), count)
        if not self._full_text:
            result = texts
        elif "messages" in columns:
            chats = columns["messages"].to_pylist()
            full = [_answered(chats[row], text) for row, text in zip(source, texts.to_pylist(), strict=True)]
            result = pa.array(full, pa.list_(MESSAGE))
        else:
            prompts = columns["text"].cast(pa.string()).take(pa.array(source))
            result = pc.binary_join_element_wise(prompts, texts, "")
        if count > 1:
            offsets = pa.array(np.arange(len(outputs) + 1, dtype=np.int32) * np.int32(count))
            result = pa.ListArray.from_arrays(offsets, result)
        return [result]

    def _decode(self, outputs: pa.Table) -> list[str]:
        """The new text of every sequence."""
        tokens = outputs["tokens"].combine_chunks().flatten()
        lengths = outputs["lengths"].combine_chunks().flatten().to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        sequences = pa.ListArray.from_arrays(pa.array(offsets), tokens)
        return self.tokenizer.batch_decode(sequences.to_pylist(), skip_special_tokens=True)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """New tokens of a row, the mean over its sequences."""
        return outputs["length"].to_numpy() / self.params.num_return_sequences


def _check_messages(messages: pa.Array) -> None:
    """:raises ValueError: for a chat without messages, and a message that is null or has no role or content.

    Content may be null where messages have more fields, such as the tool calls of an assistant.
    """
    if pc.any(pc.equal(pc.list_value_length(messages), 0)).as_py():
        raise ValueError("messages is empty")
    flat = messages.flatten()
    if flat.null_count:
        raise ValueError("messages holds a null message")
    needed = ("role", "content") if flat.type.num_fields == 2 else ("role",)
    for name in needed:
        if pc.struct_field(flat, name).null_count:
            raise ValueError(f"a message has no {name}")


def _answered(chat: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """A chat with the reply appended, or joined to the assistant's message that it continues."""
    *earlier, last = chat
    if last["role"] == "assistant":
        return [*earlier, {"role": "assistant", "content": last["content"] + text}]
    return [*chat, {"role": "assistant", "content": text}]
