"""`hfbatch attention`: the model's own weights, and an image with the tokens beside them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hfbatch.errors import SpecError
from hfbatch.pages.attention import draw
from hfbatch.runtime.attention import Attention, attention_of
from tests.jobs.tools import call
from tests.models.text import tiny_bert, tiny_bert_encoder, tiny_llama, tiny_t5
from tests.models.vision import tiny_vision

TEXT = "The engineer reads the blue mountain $before$ dawn."


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def expected(folder: str) -> tuple[np.ndarray, list[str]]:
    """From the model class itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    inputs = tokenizer(TEXT, return_tensors="pt")
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    with torch.no_grad():
        layers = model.eval()(**inputs, output_attentions=True).attentions
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    return torch.cat(layers).numpy(), [re.sub("^Ġ", "", token) for token in tokens]


@pytest.mark.parametrize("build", [tiny_bert, tiny_bert_encoder, tiny_llama, tiny_t5])
def test_the_weights_are_the_models_own(tmp_path: Path, build: Callable[[Path], str]) -> None:
    folder = build(tmp_path)
    weights, tokens = expected(folder)
    found = attention_of(TEXT, folder)
    assert found.tokens == tokens
    assert found.weights.shape == (2, 4, len(tokens), len(tokens))
    assert found.weights.std() > 0.01
    np.testing.assert_allclose(found.weights, weights, atol=1e-5)


def words_of(svg: Path) -> list[str]:
    return [node.text or "" for node in ET.parse(svg).iter() if node.tag.endswith("}text")]


def test_the_grid_has_every_head_and_tokens_along_two_edges(tmp_path: Path, bert: str) -> None:
    found = attention_of(TEXT, bert)
    draw(found, tmp_path / "all.svg")
    words = words_of(tmp_path / "all.svg")
    titles = [f"layer {layer}, head {head}" for layer in range(2) for head in range(4)]
    assert [word for word in words if word.startswith("layer")] == titles
    for token in set(found.tokens):
        assert words.count(token) == (2 + 4) * found.tokens.count(token)


def test_one_head_is_drawn_alone_and_the_same_each_time(tmp_path: Path, bert: str) -> None:
    found = attention_of(TEXT, bert)
    for name in ("a.svg", "b.svg"):
        draw(found, tmp_path / name, layer=1, head=2)
    words = words_of(tmp_path / "a.svg")
    assert [word for word in words if word.startswith("layer")] == ["layer 1, head 2"]
    assert "[CLS]" in words
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_dark_is_where_the_weight_is(tmp_path: Path) -> None:
    weights = np.zeros((1, 1, 2, 2), np.float32)
    weights[0, 0, 0, 1] = weights[0, 0, 1, 1] = 1  # both look at the second
    draw(Attention(["a", "b"], weights), tmp_path / "two.png")
    image_file = np.asarray(Image.open(tmp_path / "two.png").convert("L"), float)
    dark = np.argwhere(image_file < 100)
    assert len(dark) > 0.3 * 600 * 600
    assert (dark[:, 1] < image_file.shape[1] / 2).mean() < 0.05


def test_the_command_writes_a_figure_and_says_what_is_in_it(tmp_path: Path, bert: str) -> None:
    out = tmp_path / "attention.png"
    done = call("attention", TEXT, "-m", bert, "--out", str(out), "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["layers"], answer["heads"], answer["tokens"][0]) == (2, 4, "[CLS]")
    assert Image.open(out).format == "PNG"


def test_what_cannot_be_drawn_is_reported(tmp_path: Path, bert: str) -> None:
    found = attention_of(TEXT, bert)
    with pytest.raises(SpecError, match=r"ends in '\.jpg'; use one of .png, .svg"):
        draw(found, tmp_path / "a.jpg")
    with pytest.raises(SpecError) as caught:
        draw(found, tmp_path / "a.png", layer=2, head=-1)
    assert caught.value.faults == [
        "--layer 2 does not exist; the model has layers 0 to 1",
        "--head -1 does not exist; the model has heads 0 to 3",
    ]
    with pytest.raises(SpecError, match="takes 1 to 64"):
        attention_of(TEXT * 20, bert)
    with pytest.raises(
        SpecError, match="does not support feature-extraction; it supports: image-classification"
    ):
        attention_of(TEXT, tiny_vision(tmp_path, "ViTForImageClassification"))
