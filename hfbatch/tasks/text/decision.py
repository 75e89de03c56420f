"""Task decision: answers typed questions about a state with probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.tasks.answer_agreement import Items
from hfbatch.tasks.base import Example, Histogram, Params, TaskConfig
from hfbatch.tasks.pipelines.pipeline import PipelineTask
from hfbatch.tasks.tokens import flatten, text_column

OPTIONS = pa.list_(pa.struct([("option", pa.string()), ("probability", pa.float32())]))
ANSWER = pa.struct(
    [
        ("question", pa.string()), ("type", pa.string()), ("noul", pa.float32()), ("choice", pa.string()),
        ("score", pa.float32()), ("confidence", pa.float32()), ("probabilities", OPTIONS),
    ]
)  # fmt: skip


class DecisionParams(Params):
    """The questions to ask about each state."""

    questions: dict[str, dict[str, Any]] | None = None
    """Maps the name of each question to its type (choice, score, or noul: true or false), instructions and criteria."""


class Decision(PipelineTask):
    """Answers the same questions about each state, or the questions in each row."""

    name = "decision"
    summary = "Answers typed questions about a text with probabilities, by a chat or decision model"
    general = False
    auto_class = "AutoModelForCausalLM"
    pipeline = "hfbatch.tasks.text.decision_steps.DecisionPipeline"
    inputs = (text_column("state", required=False), text_column("request", required=False))
    exclusive = ("state", "request")
    outputs: ClassVar[Mapping[str, str]] = {
        "answers": "list<struct<question, type, noul, choice, score, confidence, probabilities>>: noul is the "
        "probability of true; probabilities is list<struct<option, probability>>"
    }
    Params = DecisionParams
    agreement = Items("answers", numbers=("noul", "score"))
    histogram = Histogram("confidence", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example(
        {"state": ["I was charged twice and want a refund.", "Thanks, it works!"]},
        {
            "questions": {
                "mood": {"type": "choice", "instructions": "How does the customer feel?",
                         "criteria": {"calm": None, "angry": "Complains or threatens"}},
                "urgency": {"type": "score", "criteria": ["Can wait", "This week", "Today"]},
            }
        },
    )  # fmt: skip

    params: DecisionParams

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if (self.model.read_json("config.json") or {}).get("model_type") == "jev":
            self.auto_class, self.batched = (
                "AutoModelForDecision",
                False,
            )  # its head takes one prompt per call

    def options(self) -> dict[str, Any]:
        """Returns how the model is prompted and its output is read."""
        from transformers.decision import DecisionConfig

        return {"decision_config": DecisionConfig.from_pretrained(self.model.folder)}

    def check(self) -> list[str]:
        """Also checks the questions; an error shows an example of a valid one."""
        decision = self.options()["decision_config"]
        if decision.adapter:
            return [
                f"model {self.model.name!r} has its head in the adapter {decision.adapter!r}; merge and save it"
            ]
        faults = super().check()
        if not faults and not (decision.chat_template or self.tokenizer.chat_template):
            faults = [f"model {self.model.name!r} has no chat template to ask questions in; use a chat model"]
        if faults or self.params.questions is None:
            return faults
        try:
            list(self.skeleton.preprocess({"state": "", "questions": self.params.questions}))
        except ValueError as error:
            return [f"params.questions: {error}"]
        return []

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns an error if questions or states are missing, or questions are given twice."""
        if not present:
            return ["task decision needs a column 'state' or 'request'; use --column state=COLUMN"]
        if "state" in present and not self.params.questions:
            return ["params.questions: no questions for the column 'state'; set at least one"]
        if "request" in present and self.params.questions:
            return ["params.questions: each row of the column 'request' has its own; leave them out"]
        return []

    def output_fields(self) -> list[pa.Field]:
        """`answers`: those of the pipeline in the order of the questions, without the legend of the criteria."""
        return [pa.field("answers", pa.list_(ANSWER))]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields requests: a state with the questions, or JSON of both."""
        if "request" in columns:
            yield from columns["request"].to_pylist()
        else:
            yield from (
                {"state": state, "questions": self.params.questions} for state in columns["state"].to_pylist()
            )

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Converts answers to structs."""
        return ([_struct(name, answer) for name, answer in result.items()],)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the confidence of each row's first answer; for noul, twice the probability's distance from 0.5."""
        first = [row[0] for row in flatten(columns[0]).to_pylist()]
        return np.array(
            [abs(2 * one["noul"] - 1) if one["confidence"] is None else one["confidence"] for one in first]
        )


def _struct(name: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Converts an answer to a struct with its question's name and its options as a list."""
    plain = {key: value for key, value in answer.items() if key != "legend"}
    if "probabilities" in plain:
        options = plain["probabilities"].items()
        plain["probabilities"] = [{"option": option, "probability": value} for option, value in options]
    return {"question": name, **plain}
