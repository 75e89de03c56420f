"""The model card shows what labels, columns and names hold, and none of it is markup, HTML or a command."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hfbatch.pages.model_card import as_markdown, model_card
from hfbatch.spec.finetune import FinetuneSpec

EVIL = [
    "<script>alert(1)</script>",
    "a | b | c",
    "---\nlicense: mit\n---",
    "\n\n# Heading\n\n- item",
    "```\n<img src=x onerror=alert(1)>\n```",
    "`code` **bold** _it_ ~~gone~~",
    "[click](javascript:alert(1)) ![](http://evil/x.png)",
    "&lt;b&gt; &amp; <!-- -->",
    "tab\tand\x1b]0;title\x07 and \u202e",
    "back\\slash \\",
    "$(rm -rf ~); `id` 'x",
]


def metrics_of(label: str) -> dict[str, Any]:
    """What a fine-tuning leaves, with a text in every place that a user's data reaches."""
    spec = {
        "task": "text-classification", "model": label, "output": "out", "params": {"class_weights": {label: 2.0}},
        "train": {"path": "rows", "columns": {"text": label, "label": "l"}},
    }  # fmt: skip
    figures = {"step": 3, "loss": 0.5, "accuracy": 0.75}
    return {
        "task": "text-classification",
        "method": "full",
        "model": {"name": label, "commit": "abc", "hub": False},
        "metric": "accuracy",
        "best": figures,
        "before": figures,
        "baseline": {},
        "data": {
            "rows": {part: {"rows": 9, "truncated": 0} for part in ("train", "eval")},
            "labels": {label: 5, "plain": 4},
            "digest": "d" * 32,
        },
        "trainable": 1,
        "weights": 2,
        "fingerprint": "f" * 32,
        "hfbatch": "0",
        "versions": {"python": "3"},
        "spec": FinetuneSpec.build(spec).model_dump(mode="json"),
    }


def shown(text: str) -> str:
    """A text as a page shows it: in one line, without what cannot be seen."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def check_card(label: str) -> None:
    card = ModelCard(model_card(metrics_of(label), label, label, "AutoModel"))
    assert card.data.to_dict().keys() == {"library_name", "tags", "pipeline_tag", "model-index"}
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    inner = [child for token in tokens for child in token.children or ()]
    assert {token.type for token in inner} <= {"text", "code_inline", "softbreak"}
    assert not [token for token in tokens if token.type.startswith(("html", "list", "hr", "blockquote"))]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", *["h2"] * 4]
    command, _, spec = (token.content for token in tokens if token.type == "fence")
    assert shlex.split(command) == [
        "hfbatch", "predict", "text-classification", "INPUT", "OUTPUT", "--model", label, "--column", f"text={label}",
    ]  # fmt: skip
    assert yaml.safe_load(spec)["model"]["name"] == label
    lines = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert lines.count(shown(label)) == 2  # the heading and the cell


@pytest.mark.parametrize("label", EVIL, ids=range(len(EVIL)))
def test_nothing_in_a_label_or_name_is_markup_or_a_command(label: str) -> None:
    check_card(label)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    """In a cell of a table, as labels are."""
    page = f"| a | b |\n|---|---|\n| {as_markdown(text)} | 1 |\n"
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(page)
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    assert "".join(child.content for child in cells[2].children or ()) == shown(text)
