"""Base classes of tasks that generate text from images, audio or video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.media import to_image
from hfbatch.tasks import base
from hfbatch.tasks.agreement import GeneratedTexts
from hfbatch.tasks.base import Batch, Features, Histogram, InputColumn
from hfbatch.tasks.generation.generation_config import DecodingParams, idle_faults, read_defaults
from hfbatch.tasks.multimodal.media_prompts import filled, is_images, is_typed_chat, opened
from hfbatch.tasks.pipelines.pipeline import PipelineTask
from hfbatch.tasks.tokens import text_column

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
    rendered_by="messages",
)


TRIAL_TOKENS = 8
"""New tokens per row in batch size trials."""


class BriefTrialTask(PipelineTask):
    """Base class of tasks with possibly long outputs, which are shortened in batch size trials."""

    params: Any

    @cached_property
    def brief(self) -> BriefTrialTask:
        """The same task with a lower limit of new tokens."""
        params = self.params.model_copy(update={"max_new_tokens": TRIAL_TOKENS})
        return type(self)(replace(self.settings, params=params))

    def trial_forward(self, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Generates the first few tokens."""
        return self.brief.forward(model, batch)


class MultimodalGenerationTask(BriefTrialTask):
    """Base class of tasks that generate a text for each row, with a pipeline that takes a seed per row."""

    Params: ClassVar[type[base.Params]] = DecodingParams
    outputs: ClassVar[Mapping[str, str]] = {"generated_text": "string, without the prompt"}
    split_rows = 256
    concurrent = False
    agreement = GeneratedTexts("generated_text")
    histogram = Histogram("characters", (0.0, *(float(2**k) for k in range(16))))

    params: DecodingParams

    @cached_property
    def model_defaults(self) -> GenerationConfig:
        """The model's generation settings."""
        return read_defaults(self.model, self.config)

    @property
    def sampling(self) -> bool:
        """Whether tokens are sampled."""
        asked = self.params.do_sample
        return bool(self.model_defaults.do_sample if asked is None else asked)

    def options(self) -> dict[str, Any]:
        """Returns the params, and whether to sample."""
        return {**super().options(), "do_sample": self.sampling}

    def check(self) -> list[str]:
        """Returns errors for contradictory params, and errors of the pipeline."""
        beams = self.params.num_beams or self.model_defaults.num_beams or 1
        faults = idle_faults(self.params, self.sampling, beams)
        if beams > 1 and self.sampling:
            faults.append(f"{beams} beams cannot sample; set params.num_beams=1 or params.do_sample=false")
        if self.max_length is not None:
            faults.append(f"batch.max_length: {self.name} does not truncate rows; leave it out")
        return faults or super().check()

    def notes(self) -> list[str]:
        """Returns notes on defaults."""
        found = []
        if self.sampling and self.params.do_sample is None:
            found.append("samples, as the model's generation_config says; params.do_sample=false disables it")
        if self.params.max_new_tokens is None:
            most = self.model_defaults.max_new_tokens or self.model_defaults.max_length or 256
            found.append(f"generates up to {most} tokens a row (params.max_new_tokens)")
        return found

    def output_fields(self) -> list[pa.Field]:
        """`generated_text`."""
        return [pa.field("generated_text", pa.string())]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns the model inputs of each row, and a `seed` when sampling."""
        made = super().preprocess(columns, places)
        if not self.sampling:
            return made
        from hfbatch.tasks.generation.sampling import row_seeds

        seeds = pa.array(row_seeds(self.seed, places), pa.int64())
        return replace(made, table=made.table.append_column("seed", seeds))

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns the rows' model inputs unchanged, with their seeds."""
        batch = super().collate(features, rows, multiple)
        if "seed" in features.column_names:
            import torch

            for (step,), seed in zip(batch["rows"], features["seed"].to_numpy()[rows], strict=True):
                step["seed"] = torch.tensor([seed])
        return batch

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of characters in each row's text."""
        return np.array([len(text) for text in columns[0].to_pylist()])


class PromptedTask(MultimodalGenerationTask):
    """Base class of tasks that continue a prompt in `text` or answer a chat in `messages`, with media."""

    inputs: ClassVar[tuple[InputColumn, ...]] = (IMAGES, text_column("text", required=False), MESSAGES)
    exclusive = ("text", "messages")
    media: ClassVar[tuple[str, ...]] = ("image",)
    """Columns of media; also the media types of message parts."""

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns an error unless there is exactly one of `text` and `messages`, with media or a chat template."""
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
        """The chat template of the model's processor; None if there is none."""
        try:
            return getattr(self.processors.get("processor"), "chat_template", None)
        except (OSError, ValueError, ImportError):  # which check reports
            return None

    def open_image(self, value: Any) -> Any:
        """Decodes an image: upright and in RGB, as transformers loads it."""
        from transformers.image_utils import load_image

        return load_image(to_image(value, self.files))

    @property
    def openers(self) -> dict[str, Any]:
        """Maps each media type to its decoder."""
        return {"image": self.open_image}

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields prompts or chats with their media, decoded row by row."""
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
