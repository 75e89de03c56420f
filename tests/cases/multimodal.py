"""Cases of the tasks over images, pages, tables and audio with text."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    ViltForQuestionAnswering,
    ViltProcessor,
    pipeline,
)

from tests.cases.audio import RECORDINGS
from tests.cases.case import Answer, Case
from tests.cases.vision import image_files
from tests.models.multimodal import (
    tiny_blip,
    tiny_layoutlm,
    tiny_llava,
    tiny_qwen2_audio,
    tiny_tapas,
    tiny_vilt,
)
from tests.models.text import CORPUS

ASKED = ["who reads the river?", "is it a table?", "what does not forget, word for word?"]
QUESTIONS = [ASKED[k % 3] for k in range(22)]
WORDS = [" ".join(CORPUS[k : k + 1 + (k * 5) % 13]).split() for k in range(22)]
SHORT = {"max_new_tokens": 8}
FINDING = {"top_k": 2, "doc_stride": 8, "max_seq_len": 40}
BAD_IMAGE = b"this is no picture"


def boxes(words: list[str], seed: int) -> list[list[int]]:
    """A box for each word: left, top, right and bottom."""
    return np.sort(np.random.default_rng(seed).integers(0, 1001, (len(words), 4))).tolist()


def table(k: int) -> str:
    """A table of words and numbers, as JSON."""
    chosen = [CORPUS[(7 * k + row) % 72].split() for row in range(1 + k % 4)]
    return json.dumps(
        {"who": [one[1] for one in chosen], "times": [str(k * row) for row in range(len(chosen))]}
    )


def chat(kind: str, file: Any, text: str) -> list[dict[str, Any]]:
    """A question about a file of some kind."""
    parts = [{"type": kind, kind: file}, {"type": "text", kind: None, "text": text}]
    return [{"role": "user", "content": parts}]


def image_file(file: bytes) -> Image.Image:
    """An image, decoded and in RGB."""
    return Image.open(BytesIO(file)).convert("RGB")


def visual_question_answering(folder: str) -> Answer:
    processor = ViltProcessor.from_pretrained(folder)
    model = ViltForQuestionAnswering.from_pretrained(folder).eval()

    def answer(row: Any) -> dict[str, Any]:
        inputs = processor(images=image_file(row["image"]), text=row["question"], return_tensors="pt")
        with torch.inference_mode():
            scores = model(**inputs).logits[0].sigmoid()
        best = scores.argsort(descending=True)[:3].tolist()
        return {"answers": [{"answer": model.config.id2label[k], "score": float(scores[k])} for k in best]}

    return answer


def document_question_answering(folder: str) -> Answer:
    pipe = pipeline("document-question-answering", folder, device="cpu", **FINDING)

    def answer(row: Any) -> dict[str, Any]:
        pairs = list(zip(row["words"], row["boxes"], strict=True))
        return {"answers": pipe(image=None, question=row["question"], word_boxes=pairs)}

    return answer


def table_question_answering(folder: str) -> Answer:
    pipe = pipeline("table-question-answering", folder, device="cpu")

    def answer(row: Any) -> dict[str, Any]:
        found = pipe(table=json.loads(row["table"]), query=row["question"])
        places = [{"row": row, "column": column} for row, column in found["coordinates"]]
        return {**found, "coordinates": places}

    return answer


def image_to_text(folder: str) -> Answer:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    pixels, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def answer(row: Any) -> dict[str, Any]:
        made = model.generate(**pixels(images=image_file(row["image"]), return_tensors="pt"), **SHORT)
        return {"generated_text": tokenizer.decode(made[0], skip_special_tokens=True)}

    return answer


def image_text_to_text(folder: str) -> Answer:
    pipe = pipeline("image-text-to-text", folder, device="cpu", **SHORT)

    def answer(row: Any) -> dict[str, Any]:
        shown, asked = row["messages"][0]["content"]
        found = pipe(text=chat("image", image_file(shown["image"]), asked["text"]), return_full_text=False)
        return {"generated_text": found[0]["generated_text"]}

    return answer


def any_to_any(folder: str) -> Answer:
    pipe = pipeline("any-to-any", folder, device="cpu", **SHORT)

    def answer(row: Any) -> dict[str, Any]:
        samples, _ = soundfile.read(BytesIO(row["audio"]), dtype="float32")
        found = pipe(text=row["text"], audio=samples, images=None, return_full_text=False)
        return {"generated_text": found[0]["generated_text"]}

    return answer


def captioner(folder: Path) -> str:
    return tiny_blip(folder, "ConditionalGeneration")


CASES = {
    "visual-question-answering": Case(
        lambda folder: tiny_vilt(folder, {k: f"answer {k}" for k in range(7)}),
        {"image": image_files(), "question": QUESTIONS},
        visual_question_answering,
        {"top_k": 3},
        unreadable=BAD_IMAGE,
    ),
    "document-question-answering": Case(
        tiny_layoutlm,
        {
            "words": WORDS,
            "boxes": [boxes(words, k) for k, words in enumerate(WORDS)],
            "question": QUESTIONS,
        },
        document_question_answering,
        FINDING,
        unreadable=["a", "word", "without", "a", "box"] * 30,
    ),
    "table-question-answering": Case(
        lambda folder: tiny_tapas(folder, {0: "NONE", 1: "SUM", 2: "COUNT"}),
        {"table": [table(k) for k in range(22)], "question": QUESTIONS},
        table_question_answering,
        unreadable="this is no table",
    ),
    "image-to-text": Case(captioner, {"image": image_files()}, image_to_text, SHORT, unreadable=BAD_IMAGE),
    "image-text-to-text": Case(
        tiny_llava,
        {"messages": [chat("image", *one) for one in zip(image_files(), QUESTIONS, strict=True)]},
        image_text_to_text,
        SHORT,
        unreadable=chat("image", BAD_IMAGE, "what?"),
    ),
    "any-to-any": Case(
        tiny_qwen2_audio,
        {"audio": RECORDINGS, "text": [f"<audio>{text}" for text in QUESTIONS]},
        any_to_any,
        SHORT,
        unreadable=b"this is no sound",
    ),
}
