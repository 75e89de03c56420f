"""What tasks share in which a model that sees or hears writes a text. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.media import to_image
from hfbatch.tasks import base
from hfbatch.tasks.base import Batch, Features, Histogram, InputColumn
from hfbatch.tasks.parts.generation import DecodingParams, idle_faults, read_defaults
from hfbatch.tasks.parts.media_prompts import filled, is_images, is_typed_chat, opened
from hfbatch.tasks.parts.pipeline import PipelineTask
from hfbatch.tasks.parts.text import text_column

if TYPE_CHECKING:
    from transformers import GenerationConfig

IMAGES = InputColumn(
    "image",
    is_images,
    "binary, string (path or URL) or struct<bytes, path>, or a list of them",
    required=False,
    files=True,
)
MESSAGES = InputColumn(
    "messages",
    is_typed_chat,
    "list<struct<role, content>>, content a string or list<struct<type, text, ...>> of parts with their files",
    required=False,
    files=True,
)


PROBE_TOKENS = 8
"""New tokens of each row when batch sizes are compared."""


class BrieflyProbed(PipelineTask):
    """Base of tasks whose model may write at length, which the choice of a batch size does not wait for."""

    params: Any

    @cached_property
    def brief(self) -> BrieflyProbed:
        """The same task, but for how much is written."""
        params = self.params.model_copy(update={"max_new_tokens": PROBE_TOKENS})
        return type(self)(self.model, params, self.max_length, self.seed)

    def probe(self, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Writes the first few tokens."""
        return self.brief.forward(model, batch)


class WritingTask(BrieflyProbed):
    """Base of tasks in which a model writes a text for each row, through a pipeline that takes a row's seed."""

    Params: ClassVar[type[base.Params]] = DecodingParams
    outputs: ClassVar[Mapping[str, str]] = {"generated_text": "string, without what was asked"}
    split_rows = 256
    concurrent = False
    histogram = Histogram("characters", (0.0, *(float(2**k) for k in range(16))))

    params: DecodingParams

    @cached_property
    def model_defaults(self) -> GenerationConfig:
        """The model's own generation settings."""
        return read_defaults(self.model, self.config)

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn at random."""
        asked = self.params.do_sample
        return bool(self.model_defaults.do_sample if asked is None else asked)

    def options(self) -> dict[str, Any]:
        """The params, and whether to sample."""
        return {**super().options(), "do_sample": self.sampling}

    def check(self) -> list[str]:
        """Faults: params that contradict each other, and what the pipeline refuses."""
        beams = self.params.num_beams or self.model_defaults.num_beams or 1
        faults = idle_faults(self.params, self.sampling, beams)
        if beams > 1 and self.sampling:
            faults.append(f"{beams} beams cannot sample; set params.num_beams=1 or params.do_sample=false")
        if self.max_length is not None:
            faults.append(f"batch.max_length: {self.name} reads rows whole; leave it out")
        return faults or super().check()

    def notes(self) -> list[str]:
        """What the user left open."""
        found = []
        if self.sampling and self.params.do_sample is None:
            found.append("samples, as the model's generation_config says; params.do_sample=false does not")
        if self.params.max_new_tokens is None:
            most = self.model_defaults.max_new_tokens or self.model_defaults.max_length or 256
            found.append(f"writes up to {most} tokens a row (params.max_new_tokens)")
        return found

    def output_fields(self) -> list[pa.Field]:
        """`generated_text`."""
        return [pa.field("generated_text", pa.string())]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Model inputs of each row, and a `seed` when sampling."""
        made = super().preprocess(columns, places)
        if not self.sampling:
            return made
        from hfbatch.tasks.parts.sampling import row_seeds

        seeds = pa.array(row_seeds(self.seed, places), pa.int64())
        return replace(made, table=made.table.append_column("seed", seeds))

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """The rows' model inputs as they are, each with its seed."""
        batch = super().collate(features, rows, multiple)
        if "seed" in features.column_names:
            import torch

            for (step,), seed in zip(batch["rows"], features["seed"].to_numpy()[rows], strict=True):
                step["seed"] = torch.tensor([seed])
        return batch

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Characters of each row's text."""
        return np.array([len(text) for text in columns[0].to_pylist()])


class PromptedTask(WritingTask):
    """Base of tasks that continue a prompt in `text` or answer a chat in `messages`, with media in them."""

    inputs: ClassVar[tuple[InputColumn, ...]] = (IMAGES, text_column("text", required=False), MESSAGES)
    exclusive = ("text", "messages")
    media: ClassVar[tuple[str, ...]] = ("image",)
    """Columns of media, which are kinds of parts of messages too."""

    def column_faults(self, present: set[str]) -> list[str]:
        """Exactly one of `text` and `messages` has to be there; media for a text, a chat template for messages."""
        asked = present & {"text", "messages"}
        if len(asked) != 1:
            state = "both" if asked else "neither"
            return [
                f"input has {state} of 'text' and 'messages'; name the one to read: "
                "--column text=COLUMN or --column messages=COLUMN"
            ]
        if "messages" in asked and not self.chat_template:
            return [
                f"model {self.model.name!r} has no chat template, so it cannot read messages; "
                "give prompts with --column text=COLUMN"
            ]
        if "text" in asked and not present & set(self.media):
            return [f"input has a text, but no {' or '.join(self.media)}; use --column image=COLUMN"]
        return []

    @property
    def chat_template(self) -> Any:
        """The template of the model's processor; None if there is none."""
        try:
            return getattr(self.processors.get("processor"), "chat_template", None)
        except (OSError, ValueError, ImportError):  # which check tells
            return None

    def open_image(self, value: Any) -> Any:
        """A picture, decoded: upright and in RGB, as transformers loads it."""
        from transformers.image_utils import load_image

        return load_image(to_image(value, self.files))

    @property
    def openers(self) -> dict[str, Any]:
        """What decodes each kind of media."""
        return {"image": self.open_image}

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Prompts or chats with their media, decoded row by row."""
        openers = self.openers
        for k in range(len(next(iter(columns.values())))):
            given = {
                kind: opened(columns[kind][k].as_py(), openers[kind])
                for kind in self.media
                if kind in columns
            }
            if "messages" in columns:
                yield {"messages": filled(columns["messages"][k].as_py(), given, openers)}
            else:
                yield {"text": columns["text"][k].as_py(), **given}
