"""Pipelines for images with text that transformers does not have or that need changes.

They implement the steps of its `Pipeline`, so that the adapter runs them like all others.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from pandas import DataFrame
from transformers import GenerationConfig, LogitsProcessorList
from transformers.image_utils import load_image
from transformers.pipelines import any_to_any
from transformers.pipelines.base import Pipeline
from transformers.pipelines.document_question_answering import DocumentQuestionAnsweringPipeline
from transformers.pipelines.image_text_to_text import Chat, ImageTextToTextPipeline, ReturnType
from transformers.pipelines.table_question_answering import TableQuestionAnsweringPipeline

from hfbatch.tasks.generation.sampling import GumbelNoise, warpers

if TYPE_CHECKING:
    from hfbatch.tasks.base import Task


def architecture_faults(task: Task, fits: Collection[str], instead: str) -> list[str]:
    """Returns an error if the model's class does not support the task.

    :param fits: names of supported model classes.
    :param instead: what to use instead, for the message.
    """
    classes = task.config.architectures or [task.config.model_type]
    remote = task.model.trust_remote_code and task.auto_class in (
        getattr(task.config, "auto_map", None) or {}
    )
    if remote or any(name in fits for name in classes):
        return []
    return [
        f"model {task.model.name!r} is a {', '.join(classes)}, which does not support {task.name}; use {instead}"
    ]


class VisualQuestionAnsweringPipeline(Pipeline):
    """Answers questions about images with a classifier or a generative model.

    Source: the documented use of ViltForQuestionAnswering and BlipForQuestionAnswering, and the pipeline of
    transformers 4: the sigmoid of each answer's logit is its score; a generated answer has none.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False
    _pipeline_calls_generate = True
    _non_generation_params = ("top_k",)
    _default_generation_config = None

    def _sanitize_parameters(
        self, top_k: int = 5, **generation: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {"top_k": top_k}

    def preprocess(self, row: dict[str, Any]) -> dict[str, Any]:
        """Processes the image and the question, truncated to the model's limit."""
        image, question = load_image(row["image"]), row["question"]
        return dict(self.processor(images=image, text=question, truncation=True, return_tensors="pt"))

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        if self.model.can_generate():
            options = self._prepare_generate_kwargs({}, return_dict_in_generate=False)
            return {"tokens": self.model.generate(**model_inputs, **options)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # ViLT shuffles the patches of an image, which changes the last bits
            return {"logits": self.model(**model_inputs)["logits"]}

    def postprocess(self, output: Any, top_k: int) -> list[dict[str, Any]]:
        """Returns answers with their scores, best first."""
        if "tokens" in output:
            answer = self.processor.decode(output["tokens"][0], skip_special_tokens=True)
            return [{"answer": answer.strip(), "score": None}]
        scores, places = output["logits"][0].sigmoid().sort(descending=True, stable=True)
        names = self.model.config.id2label
        pairs = zip(places[:top_k].tolist(), scores[:top_k].tolist(), strict=True)
        return [{"answer": names[place], "score": score} for place, score in pairs]


class DocumentPipeline(DocumentQuestionAnsweringPipeline):
    """The pipeline of transformers, with per-row values packed separately, so that windows of equal shape run together.

    Does not request the attentions of Donut, which are unused.
    """

    OWN = ("p_mask", "word_ids", "words")

    def preprocess(self, row: dict[str, Any], **options: Any) -> Iterator[dict[str, Any]]:
        """Yields windows over the words, each after the question; or the image with the prompt of Donut."""
        if "word_boxes" in row:
            self._require_room(row, options)
        for step in super().preprocess(row, **options):
            step.pop("output_attentions", None)
            own = json.dumps({name: step.pop(name) for name in self.OWN})
            yield {**step, "own": own}

    def _require_room(self, row: dict[str, Any], options: dict[str, Any]) -> None:
        """Checks for room. :raises ValueError: if windows could not advance, which would crash the process."""
        width = options.get("max_seq_len") or self.tokenizer.model_max_length
        stride = options.get("doc_stride") or min(width // 2, 256)
        question = self.tokenizer(row["question"].split(), is_split_into_words=True)["input_ids"]
        room = width - len(question) - 1
        if room <= stride:
            raise ValueError(
                f"the question leaves {max(room, 0)} of {width} tokens for the words, but windows overlap by {stride}; "
                "shorten it, or set params.doc_stride lower"
            )

    def _forward(self, model_inputs: Any, **options: Any) -> dict[str, Any]:
        own = model_inputs.pop("own")
        outputs = super()._forward(model_inputs, **options)
        kept = ("sequences", "start_logits", "end_logits", "attention_mask", "is_last")
        return {**{name: outputs[name] for name in kept if name in outputs}, "own": own}

    def postprocess(self, steps: list[Any], top_k: int = 1, **options: Any) -> list[dict[str, Any]]:
        """Returns the best answers over all windows."""
        whole = [{**step, **json.loads(step["own"])} for step in steps]
        return super().postprocess(whole, top_k=top_k, **options)


class TablePipeline(TableQuestionAnsweringPipeline):
    """The pipeline of transformers, with tables as JSON of string columns, to send them between processes."""

    def preprocess(self, row: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Tokenizes the question with the table's cells; drops rows that do not fit, then truncates cells."""
        made = super().preprocess({"table": DataFrame(row["table"]), "query": row["question"]}, **options)
        return {**made, "table": json.dumps(row["table"])}

    def _forward(self, model_inputs: Any, **options: Any) -> dict[str, Any]:
        made = super()._forward(model_inputs, **options)
        return {**made, "outputs": made["outputs"].to_tuple()[:2]}

    def postprocess(self, made: Any) -> dict[str, Any]:
        """Returns the cells of the answer, and their aggregation."""
        return super().postprocess({**made, "table": DataFrame(json.loads(made["table"]))})


def drawn(pipe: Pipeline, seeds: torch.Tensor | None) -> dict[str, Any]:
    """Returns arguments of generate that make greedy decoding sample; none without seeds.

    :param seeds: int64 [rows].
    """
    if seeds is None:
        return {}
    config = copy.deepcopy(pipe.model.generation_config)
    config.update(**pipe._generate_kwargs)
    config.top_k = 50 if config.top_k is None else config.top_k  # the default of generate
    choose = LogitsProcessorList([*warpers(config, seeds.device), GumbelNoise(seeds, 0)])
    return {"do_sample": False, "logits_processor": choose}


class CaptionPipeline(Pipeline):
    """Generates text for an image without a prompt.

    Source: the documented use of BLIP, GIT and TrOCR for captions, and the pipeline of transformers 4.
    """

    _load_tokenizer = _load_image_processor = True
    _load_processor = _load_feature_extractor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._generation_defaults.pop("pad_token_id", None)  # BLIP's generate sets its own

    def _sanitize_parameters(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {}

    def preprocess(self, image: Any) -> dict[str, Any]:
        """Returns the image's pixels, or patches."""
        return dict(self.image_processor(images=load_image(image), return_tensors="pt"))

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        chosen = drawn(self, model_inputs.pop("seed", None))
        return {"tokens": self.model.generate(**model_inputs, **self._prepare_generate_kwargs(chosen))}

    def postprocess(self, made: Any) -> str:
        """Decodes the tokens."""
        return self.tokenizer.decode(made["tokens"][0], skip_special_tokens=True)


class PromptPipeline(Pipeline):
    """A mixin that splits a prompt or chat pipeline of transformers into steps; comes before it in the bases."""

    def preprocess(self, row: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Processes the prompt or chat with its media; does not pass on the prompt itself."""
        return {**super().preprocess(self.inputs_of(row), **options), "text": ""}

    def _forward(self, model_inputs: Any, **options: Any) -> dict[str, Any]:
        chosen = drawn(self, model_inputs.pop("seed", None))
        return super()._forward(model_inputs, **{**options, "generate_kwargs": chosen})


class ImagePromptPipeline(PromptPipeline, ImageTextToTextPipeline):
    """The pipeline of transformers, which returns only the new text."""

    def inputs_of(self, row: dict[str, Any]) -> Any:
        """Converts a row to the pipeline's input."""
        if "messages" in row:
            return Chat(row["messages"])
        images = row["image"]
        return (
            {"images": images if len(images) > 1 else images[0], "text": row["text"]}
            if images
            else row["text"]
        )

    def postprocess(self, made: Any) -> str:
        """Returns the new text."""
        return super().postprocess(made, return_type=ReturnType.NEW_TEXT)[0]["generated_text"]


class AnyPromptPipeline(PromptPipeline, any_to_any.AnyToAnyPipeline):
    """The pipeline of transformers, which returns only the new text."""

    def __init__(self, **options: Any) -> None:
        Pipeline.__init__(self, **options)  # its own __init__ requires torchvision, which images do not need

    def preprocess(self, row: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Sets the model's sampling rate for audio beside a prompt, and calls the base."""
        rate = {"sampling_rate": self.feature_extractor.sampling_rate} if row.get("audio") else {}
        return super().preprocess(row, **options, **rate)

    def inputs_of(self, row: dict[str, Any]) -> Any:
        """Converts a row to the pipeline's input."""
        if "messages" in row:
            return any_to_any.Chat(row["messages"])
        given = {"images": row.get("image") or None, "audio": row.get("audio") or None}
        return {"text": row["text"], "videos": None, **given}

    def postprocess(self, made: Any, **options: Any) -> str:
        """Returns the new text."""
        (record,) = super().postprocess(made, **{**options, "return_type": any_to_any.ReturnType.NEW_TEXT})
        return record["generated_text"]
