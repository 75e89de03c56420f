"""What an adapter's settings have to be where an engine runs it beside its base model, as vLLM does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfbatch.hub.adapters import WEIGHTS
from hfbatch.hub.jsonfiles import read_object
from hfbatch.hub.modelfiles import ADAPTER_CONFIG, MERGE
from hfbatch.hub.weights import shapes_of

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank that every supported version of vLLM takes."""
PLAIN = {"peft_type": "LORA", "bias": "none"}
"""Settings with a single value that vLLM runs."""
DRAWN = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways to initialise an adapter that leave the base's weights alone, besides true and false."""
READ = frozenset(("r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform", "layers_pattern"))
OF_TRAINING = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "exclude_modules", "lora_dropout", "fan_in_fan_out", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        *("qalora_group_size", "ensure_weight_tying"),
    )
)
"""Settings that change nothing once the adapter is trained. Any other one that is set, of a newer peft too, may change texts."""
MATRICES = tuple(f".lora_{part}{end}" for part in ("A", "B") for end in ("", ".weight"))
MOST_SHOWN = 60


def plain_lora_faults(model: str, folder: str, engine: str) -> list[str]:
    """Returns an error for an adapter that vLLM refuses, or that some of its versions would run as another one.

    :param model: name of the adapter, for errors.
    """
    config = read_object(Path(folder) / ADAPTER_CONFIG) or {}
    found = [f"{name}={_shown(config[name])}" for name in sorted(config) if not _runs(name, config[name])]
    if "peft_type" not in config or "r" not in config:
        found.append("no peft_type" if "peft_type" not in config else "no r")
    where = ADAPTER_CONFIG
    if not found:
        names = sorted(name for name, _ in shapes_of(Path(folder) / WEIGHTS) if not name.endswith(MATRICES))
        found, where = ([names[0]] if names else []), WEIGHTS
    if not found:
        return []
    return [
        f"model {model!r}: {where} has {', '.join(found)}, and engine {engine} runs plain LoRA of rank 1 to {RANKS[-1]}; {MERGE}"
    ]


def rank_limit(folder: str) -> int:
    """Returns the --max-lora-rank of an adapter without faults."""
    config = read_object(Path(folder) / ADAPTER_CONFIG) or {}
    return next(rank for rank in RANKS if rank >= config["r"])


def _runs(name: str, value: Any) -> bool:
    """Whether the result with a setting of adapter_config.json is that of plain LoRA."""
    if name == "r":
        return type(value) is int and 1 <= value <= RANKS[-1]
    if name in PLAIN:
        return bool(value == PLAIN[name])
    if name == "init_lora_weights":
        return not isinstance(value, str) or value.lower() in DRAWN
    return name in READ | OF_TRAINING or not value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"
