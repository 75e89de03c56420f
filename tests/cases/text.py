"""Cases of the tasks over text."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import CrossEncoder
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    pipeline,
)

from tests.cases.case import Answer, Case, columns_of
from tests.models.late import tiny_pylate
from tests.models.text import (
    CORPUS,
    tiny_bert,
    tiny_bert_encoder,
    tiny_bert_for,
    tiny_llama,
    tiny_t5,
)
from tests.tasks.test_multi_vector_embedding import by_hand, projections
from tests.tasks.test_question_answering import best_spans

TEXTS = [*CORPUS[:14], "", "river " * 200, "Numbers, numbers: 10:45!", *CORPUS[40:45]]
LABELS = ["weather", "work", "mathematics of the night"]
TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}
LIMIT = 64


def piped(task: str, **options: Any) -> Any:
    """The task's pipeline on the CPU."""
    pipe = pipeline(task, device="cpu", **options)
    pipe.tokenizer.model_max_length = LIMIT
    return pipe


def text_classification(folder: str) -> Answer:
    pipe = piped("text-classification", model=folder, top_k=2)
    return lambda row: columns_of(pipe([row["text"]], truncation=True)[0])


def token_classification(folder: str) -> Answer:
    pipe = piped("token-classification", model=folder, aggregation_strategy="simple", stride=8)
    return lambda row: {"entities": pipe(row["text"])}


def question_answering(folder: str) -> Answer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()

    def answer(row: Any) -> dict[str, Any]:
        spans = best_spans(tokenizer, model, row["question"], row["context"], 2, 15, False)
        return {
            "answers": [
                {"score": score, "start": start, "end": end, "answer": row["context"][start:end]}
                for score, start, end in spans
            ]
        }

    return answer


def fill_mask(folder: str) -> Answer:
    pipe = piped("fill-mask", model=folder, top_k=3, tokenizer_kwargs={"truncation": True})

    def answer(row: Any) -> dict[str, Any]:
        found = pipe(row["text"])
        return {"fills": found if isinstance(found[0], list) else [found]}

    return answer


def zero_shot_classification(folder: str) -> Answer:
    pipe = piped("zero-shot-classification", model=folder)

    def answer(row: Any) -> dict[str, Any]:
        found = pipe(row["text"], candidate_labels=LABELS, multi_label=True)
        return {"labels": found["labels"], "scores": found["scores"]}

    return answer


def text_ranking(folder: str) -> Answer:
    oracle = CrossEncoder(folder, device="cpu", max_length=LIMIT)
    sigmoid = torch.nn.Sigmoid()

    def answer(row: Any) -> dict[str, Any]:
        pairs = [(row["query"], text) for text in row["documents"]]
        scored = [oracle.predict([pair], activation_fn=sigmoid, show_progress_bar=False)[0] for pair in pairs]
        return {"scores": scored}

    return answer


def feature_extraction(folder: str) -> Answer:
    pipe = piped("feature-extraction", model=folder, truncation=True)
    return lambda row: {"features": pipe(row["text"])[0]}


def embedding(folder: str) -> Answer:
    """Mean of the token vectors, as model cards of sentence-transformers write it out."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def answer(row: Any) -> dict[str, Any]:
        inputs = tokenizer(row["text"], return_tensors="pt", truncation=True)
        with torch.inference_mode():
            return {"embedding": model(**inputs).last_hidden_state[0].mean(0).tolist()}

    return answer


def sparse_embedding(folder: str) -> Answer:
    """The formula of SPLADE, as its model cards write it out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()

    def answer(row: Any) -> dict[str, Any]:
        inputs = tokenizer(row["text"], return_tensors="pt", truncation=True)
        with torch.inference_mode():
            vector = torch.log1p(torch.relu(model(**inputs).logits[0])).amax(0)
        indices = vector.nonzero()[:, 0]
        return {"indices": indices.tolist(), "values": vector[indices].tolist()}

    return answer


def multi_vector_embedding(folder: str) -> Answer:
    """The rules of ColBERT, with the projections of PyLate."""
    vectors = by_hand(folder, "[D] ", 30, False, False, ".,", projections(folder))
    return lambda row: {"embeddings": vectors(row["text"]).tolist()}


def text_generation(folder: str) -> Answer:
    pipe = pipeline("text-generation", folder, device="cpu")

    def answer(row: Any) -> dict[str, Any]:
        (found,) = pipe(row["text"], max_new_tokens=8, do_sample=False)
        return {"generated_text": found["generated_text"]}

    return answer


def seq2seq(column: str, prefix: str = "", **options: Any) -> Any:
    """The documented use of encoder-decoder models: tokenise, generate, decode."""

    def load(folder: str) -> Answer:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()

        def answer(row: Any) -> dict[str, Any]:
            text = prefix + row["text"]
            ids = tokenizer(text, return_tensors="pt", truncation=True, return_token_type_ids=False)
            with torch.inference_mode():
                best = model.generate(**ids, do_sample=False, max_new_tokens=8, **options)
            return {column: tokenizer.decode(best[0], skip_special_tokens=True)}

        return answer

    return load


CASES = {
    "text-classification": Case(
        lambda folder: tiny_bert(folder, id2label=NLI), {"text": TEXTS}, text_classification, {"top_k": 2}
    ),
    "token-classification": Case(
        lambda folder: tiny_bert_for(folder, "TokenClassification", id2label=TAGS),
        {"text": TEXTS},
        token_classification,
        {"aggregation_strategy": "simple", "stride": 8},
    ),
    "question-answering": Case(
        lambda folder: tiny_bert_for(folder, "QuestionAnswering"),
        {
            "question": [f"who {word}?" for word in ("reads", "forgets", "crosses", "writes a table")] * 6,
            "context": [" ".join(CORPUS[k : k + 1 + k % 7]) for k in range(24)],
        },
        question_answering,
        {"top_k": 2, "doc_stride": 8, "max_seq_len": 40},
        unreadable="a question that fills the window " * 9,
    ),
    "fill-mask": Case(
        lambda folder: tiny_bert_for(folder, "MaskedLM"),
        {"text": [f"{text[:30 + k]} [MASK] by the" + " [MASK]" * (k % 2) for k, text in enumerate(CORPUS[:24])]},
        fill_mask,
        {"top_k": 3},
        unreadable="nothing to fill",
    ),
    "zero-shot-classification": Case(
        lambda folder: tiny_bert_for(folder, "SequenceClassification", id2label=NLI),
        {"text": [text for text in TEXTS if text]},
        zero_shot_classification,
        {"candidate_labels": LABELS, "multi_label": True},
        unreadable="",
    ),
    "text-ranking": Case(
        lambda folder: tiny_bert(folder, num_labels=1),
        {
            "query": [*CORPUS[:20], "dawn " * 90, ""],
            "documents": [[CORPUS[(7 * k + step) % 72] for step in range(k % 4)] for k in range(22)],
        },
        text_ranking,
    ),
    "feature-extraction": Case(tiny_bert_encoder, {"text": TEXTS}, feature_extraction),
    "embedding": Case(tiny_bert_encoder, {"text": TEXTS}, embedding),
    "multi-vector-embedding": Case(tiny_pylate, {"text": TEXTS}, multi_vector_embedding),
    "sparse-embedding": Case(
        lambda folder: tiny_bert_for(folder, "MaskedLM"), {"text": TEXTS}, sparse_embedding
    ),
    "text-generation": Case(
        tiny_llama,
        {"text": [text[: 4 + 3 * k] for k, text in enumerate(CORPUS[:24])]},
        text_generation,
        {"max_new_tokens": 8, "do_sample": False},
    ),
    "text2text-generation": Case(
        tiny_t5, {"text": TEXTS}, seq2seq("generated_text", num_beams=2), {"max_new_tokens": 8, "num_beams": 2}
    ),
    "summarization": Case(
        tiny_t5, {"text": TEXTS}, seq2seq("summary_text", no_repeat_ngram_size=2),
        {"max_new_tokens": 8, "no_repeat_ngram_size": 2},
    ),
    "translation": Case(
        lambda folder: tiny_t5(folder, task_specific_params={"translation_en_to_de": {"prefix": "in German: "}}),
        {"text": TEXTS},
        seq2seq("translation_text", prefix="in German: "),
        {"max_new_tokens": 8, "src_lang": "en", "tgt_lang": "de"},
    ),
}  # fmt: skip
