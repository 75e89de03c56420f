"""Cases of the tasks that answer questions other than about a plain text."""

from __future__ import annotations

from typing import Any

from transformers import pipeline

from tests.cases.case import Answer, Case
from tests.models.text import CORPUS
from tests.tasks.test_decision import QUESTIONS, STATES, chat_model


def decision(folder: str) -> Answer:
    pipe = pipeline("decision", folder, device="cpu")
    names = ("type", "choice", "noul", "score", "confidence")

    def answer(row: Any) -> dict[str, Any]:
        found = []
        for name, one in pipe({"state": row["state"], "questions": QUESTIONS}).items():
            chances = one.get("probabilities")
            options = chances and [{"option": key, "probability": value} for key, value in chances.items()]
            found.append({"question": name, "probabilities": options, **{key: one.get(key) for key in names}})
        return {"answers": found}

    return answer


CASES = {
    "decision": Case(
        chat_model,
        {"state": [*CORPUS[20:31], *STATES]},
        decision,
        {"questions": QUESTIONS},
        unreadable="long " * 900,
    ),
}
