"""Pipelines that transformers does not have: question answering, dropped in version 5, and reranking.

They have the steps of its `ChunkPipeline`, so that the adapter runs them as it runs all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers.pipelines.base import ChunkPipeline


class QuestionAnsweringPipeline(ChunkPipeline):
    """Spans of a context that answer a question, over windows of a long context.

    Source: run_qa of transformers' examples and the pipeline of transformers 4: in each window, the softmax of
    start and end logits over the context's tokens and the first token, which stands for no answer; a span's
    score is the product.
    """

    _load_processor = _load_image_processor = _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(
        self,
        top_k: int = 1,
        doc_stride: int = 128,
        max_seq_len: int = 384,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        asked = {"top_k": top_k, "longest": max_answer_len, "may_be_none": handle_impossible_answer}
        return {"width": max_seq_len, "stride": doc_stride}, {}, asked

    def preprocess(self, row: dict[str, str], width: int, stride: int) -> Iterator[dict[str, Any]]:
        """Windows over the context, each with the question before it."""
        question, context = row["question"], row["context"]
        width = min(width, self.tokenizer.model_max_length)
        room = width - len(self.tokenizer(question)["input_ids"]) - 1
        if room < 1:
            raise ValueError(f"the question leaves no room for the context in {width} tokens")
        encoded = self.tokenizer(
            question, context, truncation="only_second", max_length=width, stride=min(stride, room // 2),
            return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt", padding="longest",
        )  # fmt: skip
        for k in range(len(encoded["input_ids"])):
            inside = [part == 1 for part in encoded.sequence_ids(k)]
            yield {
                **{name: encoded[name][k : k + 1] for name in self.tokenizer.model_input_names},
                "offset_mapping": encoded["offset_mapping"][k : k + 1],
                "inside": inside,
                "context": context if k == 0 else "",
                "is_last": k == len(encoded["input_ids"]) - 1,
            }

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        extra = {name: model_inputs.pop(name) for name in ("offset_mapping", "inside", "context", "is_last")}
        output = self.model(**model_inputs)
        return {"start_logits": output["start_logits"], "end_logits": output["end_logits"], **extra}

    def postprocess(
        self, steps: list[Any], top_k: int, longest: int, may_be_none: bool
    ) -> list[dict[str, Any]]:
        """The best spans over all windows."""
        context = steps[0]["context"]
        found: dict[tuple[int, int], float] = {}
        none = 1.0
        for step in steps:
            inside = np.array(step["inside"])
            usable = inside.copy()
            usable[0] = True
            start, end = (
                _softmax(step[f"{side}_logits"][0].float().numpy(), usable) for side in ("start", "end")
            )
            none = min(none, float(start[0] * end[0]))
            spans = np.outer(start * inside, end * inside)
            spans = np.triu(spans) - np.triu(spans, longest)
            best = np.argsort(-spans, axis=None, kind="stable")[:top_k]
            offsets = step["offset_mapping"][0].tolist()
            for first, last in zip(*np.unravel_index(best, spans.shape), strict=True):
                place, score = (offsets[first][0], offsets[last][1]), float(spans[first, last])
                if score > found.get(place, 0.0):
                    found[place] = score
        answers = [
            {"score": score, "start": first, "end": last, "answer": context[first:last]}
            for (first, last), score in sorted(found.items(), key=lambda one: (-one[1], one[0]))
        ]
        if may_be_none:
            answers.append({"score": none, "start": 0, "end": 0, "answer": ""})
            answers.sort(key=lambda one: -one["score"])
        return answers[:top_k] or [{"score": 0.0, "start": 0, "end": 0, "answer": ""}]


def _softmax(logits: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Softmax over some of the tokens; the others get 0: float64 [tokens]."""
    shifted = np.where(usable, logits.astype(np.float64), -np.inf)
    powers = np.exp(shifted - shifted.max())
    return powers / powers.sum()


class TextRankingPipeline(ChunkPipeline):
    """Scores of a query with each of some documents, by a cross-encoder.

    Source: sentence-transformers' CrossEncoder.predict: the logit of a model of one label through a sigmoid,
    logits of several labels as they are; here the first label counts.
    """

    _load_processor = _load_image_processor = _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(
        self, activation: str = "sigmoid"
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {"activation": activation}

    def preprocess(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The query with each document."""
        documents = row["documents"]
        for k, document in enumerate(documents):
            encoded = self.tokenizer(row["query"], document, truncation="longest_first", return_tensors="pt")
            yield {**encoded, "is_last": k == len(documents) - 1}

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        is_last = model_inputs.pop("is_last")
        return {"logits": self.model(**model_inputs)["logits"], "is_last": is_last}

    def postprocess(self, steps: list[Any], activation: str) -> list[float]:
        """A score for each document, in the order of the documents."""
        logits = [step["logits"][0, 0] for step in steps]
        return [float(logit.sigmoid() if activation == "sigmoid" else logit) for logit in logits]
