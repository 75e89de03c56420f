"""Metrics of written texts are those of the libraries, and mean what they say."""

from __future__ import annotations

import math

import jiwer
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from hfbatch.train.metrics.generation import bleu, chrf, error_rates, exact_match, perplexity, rouge

REFERENCES = ["the cat sat on the mat", "engineers were reading numbers", "one small step for a man"]
TEXTS = ["the cat sat on a mat", "an engineer reads numbers", "one small step for a man"]


def test_rouge_is_the_mean_of_the_rows() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score(reference, text) for reference, text in zip(REFERENCES, TEXTS, strict=True)]
    found = rouge(TEXTS, REFERENCES)
    assert found == {name: pytest.approx(sum(row[name].fmeasure for row in rows) / 3) for name in rows[0]}
    assert rouge(["the cat sat"], ["the cat ran"]) == {
        "rouge1": pytest.approx(2 / 3),
        "rouge2": pytest.approx(1 / 2),
        "rougeL": pytest.approx(2 / 3),
    }


def test_rouge_of_other_scripts_needs_words_of_any_script() -> None:
    texts, references = ["дом очень мал"], ["дом мал"]
    assert rouge(texts, references)["rouge1"] == 0
    assert rouge(texts, references, english=False)["rouge1"] == pytest.approx(0.8)


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    assert bleu(TEXTS, REFERENCES)["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, [REFERENCES]).score)
    assert chrf(TEXTS, REFERENCES)["chrf"] == pytest.approx(sacrebleu.corpus_chrf(TEXTS, [REFERENCES]).score)
    chinese = ["今天天气很好我们去公园"], ["今天天气很好我们去学校"]
    assert bleu(*chinese)["bleu"] == 0
    assert bleu(*chinese, tokenizer="zh")["bleu"] > 50


def test_error_rates_count_over_all_rows() -> None:
    assert error_rates(TEXTS, REFERENCES) == {
        "wer": pytest.approx(jiwer.wer(REFERENCES, TEXTS)),
        "cer": pytest.approx(jiwer.cer(REFERENCES, TEXTS)),
    }
    assert error_rates(["a b", ""], ["a c", "d e f g"])["wer"] == pytest.approx(5 / 6)


def test_exact_match_and_perplexity() -> None:
    assert exact_match([" yes", "no", "maybe"], ["yes ", "No", "maybe"]) == {
        "exact_match": pytest.approx(2 / 3)
    }
    assert perplexity(3 * math.log(7), 3) == {"perplexity": pytest.approx(7)}
    assert perplexity(1e6, 1) == {"perplexity": math.inf}
