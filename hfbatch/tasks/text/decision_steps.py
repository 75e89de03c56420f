"""The decision pipeline of transformers in separate steps: tokenizes, scores and answers a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from transformers.decision.modeling_utils import DecisionMixin, process_scores
from transformers.decision.template_utils import Question
from transformers.pipelines import decision
from transformers.pipelines.base import ChunkPipeline


class DecisionPipeline(decision.DecisionPipeline, ChunkPipeline):
    """transformers' pipeline with a step per prompt, and with questions passed between steps as plain values."""

    def preprocess(self, request: dict[str, Any] | str) -> Iterator[dict[str, Any]]:
        """Yields each prompt of a request, with its questions and the positions of the model's outputs to read.

        :raises ValueError: for an invalid request, or a prompt longer than the model's limit.
        """
        prompts = self.decision_config.prepare_inputs(request, self.processor or self.tokenizer)
        for k, (inputs, questions) in enumerate(prompts):
            marks, length = inputs.pop("marks"), inputs["input_ids"].shape[-1]
            if length > self.tokenizer.model_max_length:
                most = self.tokenizer.model_max_length
                raise ValueError(f"the prompt has {length:,} tokens; the model takes {most:,}")
            # Lists, because prompts run as one batch only if these are equal.
            labels = [] if self.has_head else [self.label_token_ids(tuple(one.labels)) for one in questions]
            yield {
                **inputs,
                "marks": marks.tolist(),
                "labels": labels,
                "questions": [asdict(one) for one in questions],
                "is_last": k == len(prompts) - 1,
            }

    @property
    def has_head(self) -> bool:
        """Whether the model has a head that scores options; otherwise the logits of the options' labels score them."""
        return isinstance(self.model, DecisionMixin)

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        """Returns `scores`: for each question, the scores of its options, float32 [batch, options]."""
        inputs = dict(model_inputs)
        asked, labels, is_last = (inputs.pop(name) for name in ("questions", "labels", "is_last"))
        questions = [Question(**one) for one in asked]
        marks = torch.tensor(inputs.pop("marks"), device=inputs["input_ids"].device)
        if self.has_head:
            own = {"decision_questions": questions, "decision_config": self.decision_config}
            scores = [one[None] for one in self.model.decide(**inputs, marks=marks, **own)]
        else:
            logits = self.model(**inputs, use_cache=False, logits_to_keep=marks - 1).logits
            found = [logits[:, k, ids] for k, ids in enumerate(labels)]
            scores = process_scores(self.decision_config, inputs["input_ids"], marks, questions, found)
        return {"scores": scores, "questions": asked, "is_last": is_last}

    def postprocess(self, steps: list[Any]) -> dict[str, dict[str, Any]]:
        """Returns the answers, by question name."""
        return {
            asked["name"]: Question(**asked).answer(scores[0].softmax(-1).tolist())
            for step in steps
            for asked, scores in zip(step["questions"], step["scores"], strict=True)
        }
