"""What a user would write in place of hfbatch: a pipeline of transformers with batches of 8, from Parquet.

For tasks that transformers 5 dropped, the documented use of the model class, with batches of 8 too. Writes the
answers as JSON, in the shape of hfbatch's output columns, and prints one JSON line: `job_s` without start-up.

    python -m tests.benchmarks.pipelines question-answering MODEL FOLDER float32 answers.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

BATCH = 8
LABELS = ["politics", "business", "sport", "science"]
STRATEGY = "simple"
MOST_TOKENS, STRIDE, LONGEST_ANSWER = 384, 128, 15
"""Of the windows over a context, and of an answer."""
NEW_TOKENS = 24

Answers = list[dict[str, Any]]


def token_classification(model: str, dtype: str) -> Callable[[pa.Table], Answers]:
    from transformers import pipeline

    pipe = pipeline("token-classification", model, dtype=dtype, aggregation_strategy=STRATEGY)

    def answer(table: pa.Table) -> Answers:
        found = pipe(table["text"].to_pylist(), batch_size=BATCH)
        return [{"entities": [{**one, "score": float(one["score"])} for one in row]} for row in found]

    return answer


def zero_shot_classification(model: str, dtype: str) -> Callable[[pa.Table], Answers]:
    from transformers import pipeline

    pipe = pipeline("zero-shot-classification", model, dtype=dtype)

    def answer(table: pa.Table) -> Answers:
        found = pipe(table["text"].to_pylist(), LABELS, batch_size=BATCH)
        return [{"labels": row["labels"], "scores": row["scores"]} for row in found]

    return answer


def question_answering(model: str, dtype: str) -> Callable[[pa.Table], Answers]:
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reader = AutoModelForQuestionAnswering.from_pretrained(model, dtype=dtype).eval()

    def answer(table: pa.Table) -> Answers:
        best: Answers = []
        for rows in _batches(table):
            encoded = tokenizer(
                rows["question"].to_pylist(), rows["context"].to_pylist(), truncation="only_second",
                max_length=MOST_TOKENS, stride=STRIDE, return_overflowing_tokens=True,
                return_offsets_mapping=True, padding=True, return_tensors="pt",
            )  # fmt: skip
            offsets, owner = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping")
            with torch.inference_mode():
                output = reader(**encoded)
            found: list[dict[str, Any]] = [{"score": 0.0, "start": 0, "end": 0}] * len(rows)
            for k, row in enumerate(owner.tolist()):
                inside = np.array([part == 1 for part in encoded.sequence_ids(k)])
                span = _best_span(output.start_logits[k], output.end_logits[k], inside, offsets[k])
                found[row] = max(found[row], span, key=lambda one: one["score"])
            texts = rows["context"].to_pylist()
            best += [
                {"answers": [{**one, "answer": text[one["start"] : one["end"]]}]}
                for one, text in zip(found, texts, strict=True)
            ]
        return best

    return answer


def _best_span(start: Any, end: Any, inside: np.ndarray, offsets: Any) -> dict[str, Any]:
    """The span of a window with the largest product of start and end, as in transformers' run_qa."""
    usable = inside.copy()
    usable[0] = True
    start, end = (np.where(usable, logits.double().numpy(), -np.inf) for logits in (start, end))
    start, end = (
        np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() for logits in (start, end)
    )
    spans = np.outer(start * inside, end * inside)
    spans = np.triu(spans) - np.triu(spans, LONGEST_ANSWER)
    first, last = np.unravel_index(spans.argmax(), spans.shape)
    places = int(offsets[first][0]), int(offsets[last][1])
    return {"score": float(spans[first, last]), "start": places[0], "end": places[1]}


def summarization(model: str, dtype: str) -> Callable[[pa.Table], Answers]:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=dtype).eval()

    def answer(table: pa.Table) -> Answers:
        texts: list[str] = []
        for rows in _batches(table):
            encoded = tokenizer(
                rows["text"].to_pylist(), padding=True, truncation=True, return_token_type_ids=False,
                return_tensors="pt",
            )  # fmt: skip
            made = writer.generate(**encoded, max_new_tokens=NEW_TOKENS, do_sample=False)
            texts += tokenizer.batch_decode(made, skip_special_tokens=True)
        return [{"summary_text": text} for text in texts]

    return answer


def _batches(table: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(table), BATCH):
        yield table.slice(start, BATCH)


PEERS = {
    "token-classification": token_classification,
    "zero-shot-classification": zero_shot_classification,
    "question-answering": question_answering,
    "summarization": summarization,
}
"""Each loads a model and returns what answers a table."""


def main() -> None:
    if len(sys.argv) != 6 or sys.argv[1] not in PEERS:
        sys.exit(f"{__doc__}\npipelines.py {{{','.join(PEERS)}}} MODEL FOLDER DTYPE ANSWERS")
    name, model, source, dtype, out = sys.argv[1:]
    table = ds.dataset(source, format="parquet").to_table().sort_by("id")
    answer = PEERS[name](model, dtype)
    begun = time.perf_counter()
    answers = answer(table)
    seconds = time.perf_counter() - begun
    Path(out).write_text(json.dumps(answers), encoding="utf8")
    print(json.dumps({"rows": len(answers), "job_s": seconds}), flush=True)


if __name__ == "__main__":
    main()
