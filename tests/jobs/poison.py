"""A model that misbehaves on some words, or is slow, with its code beside its weights, as models on the Hub have it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.models.text import wordpiece_tokenizer

CODE = """
import os
import signal
import time

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class PoisonConfig(PretrainedConfig):
    model_type = "poison"

    def __init__(self, vocab_size=100, hidden_size=8, raises=-1, kills=-1, pause=0.0, **rest):
        self.vocab_size, self.hidden_size, self.raises, self.kills = vocab_size, hidden_size, raises, kills
        self.pause = pause
        super().__init__(**rest)


class PoisonModel(PreTrainedModel):
    config_class = PoisonConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **rest):
        if (input_ids == self.config.raises).any():
            raise ValueError("the model does not take this word")
        if (input_ids == self.config.kills).any():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.config.pause)
        return BaseModelOutput(last_hidden_state=self.embed(input_ids))
"""


def poison_model(folder: Path, raises: str = "", kills: str = "", pause: float = 0.0) -> str:
    """Writes the model.

    :param raises: a word of its vocabulary that it raises on.
    :param kills: a word of its vocabulary that kills its process.
    :param pause: seconds that each batch takes longer, in which it leaves the processor to others.
    :returns: its folder.
    """
    folder.mkdir(parents=True)
    (folder / "modeling_poison.py").write_text(CODE)
    names: dict[str, object] = {}
    exec(compile(CODE, "modeling_poison.py", "exec"), names)
    tokenizer = wordpiece_tokenizer()
    bad = {
        name: tokenizer.convert_tokens_to_ids(word)
        for name, word in (("raises", raises), ("kills", kills))
        if word
    }
    assert tokenizer.unk_token_id not in bad.values()
    config = names["PoisonConfig"](vocab_size=len(tokenizer), pause=pause, **bad)
    config.auto_map = {
        "AutoConfig": "modeling_poison.PoisonConfig",
        "AutoModel": "modeling_poison.PoisonModel",
    }
    names["PoisonModel"](config).save_pretrained(folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def slow_model(folder: Path, pause: float = 0.15) -> tuple[str, str]:
    """Writes a model that takes its time for each batch, so that a job can be killed in its midst.

    :returns: its folder, and that of a model with the same weights that does not.
    """
    slow, fast = Path(poison_model(folder / "slow", pause=pause)), folder / "fast"
    shutil.copytree(slow, fast)
    config = json.loads((slow / "config.json").read_text())
    (fast / "config.json").write_text(json.dumps({**config, "pause": 0.0}))
    return str(slow), str(fast)
