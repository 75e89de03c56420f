"""Reads the sentence-transformers files of a model, which describe how token vectors become one vector.

Reads JSON only and reports unsupported settings; runs no code of the model and does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfbatch.hub.models import Model

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
ACTIVATIONS = frozenset(
    (
        "Identity",
        "Tanh",
        "ReLU",
        "ReLU6",
        "LeakyReLU",
        "ELU",
        "SELU",
        "GELU",
        "SiLU",
        "Mish",
        "Sigmoid",
        "Hardtanh",
    )
)
"""Activation classes of torch.nn that a Dense module may use; no other code is looked up by name."""

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older form of the pooling config, in the order in which several poolings are concatenated."""
_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    *(
        f"sentence_{kind}_config.json"
        for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)


@dataclass(frozen=True)
class Normalize:
    """Scales vectors to length 1."""


@dataclass(frozen=True)
class Dense:
    """A linear layer with an activation and an optional residual connection."""

    folder: str
    """Folder of model.safetensors, relative to the model."""
    in_features: int
    out_features: int
    activation: str = "Identity"
    residual: bool = False


@dataclass(frozen=True)
class Recipe:
    """The modules after the transformer, and the preparation of its input."""

    found: bool = False
    """Whether the model has sentence-transformers files."""
    poolings: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    """Whether pooling includes the prompt's tokens."""
    steps: tuple[Normalize | Dense, ...] = ()
    """Modules applied to the pooled vector, in order."""
    max_length: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    """Name of the prompt that is used by default."""
    truncate_dim: int | None = None
    faults: tuple[str, ...] = ()
    """Settings in these files that are not supported."""


def read_recipe(model: Model) -> Recipe:
    """Reads the sentence-transformers files of a model; without them, returns mean pooling."""
    modules = model.read_json("modules.json")
    if modules is None:
        return Recipe()
    recipe = _read_general(model, Recipe(found=True))
    for module in modules:
        recipe = _read_module(model, recipe, module["type"], module.get("path", ""))
    if not any(_kind(module["type"]) == "Pooling" for module in modules):
        recipe = _fault(
            recipe, "modules.json has no Pooling module; choose a model that returns one vector per text"
        )
    return recipe


def _read_general(model: Model, recipe: Recipe) -> Recipe:
    config = model.read_json("config_sentence_transformers.json") or {}
    return replace(
        recipe,
        prompts={name: text for name, text in (config.get("prompts") or {}).items() if text},
        default_prompt=config.get("default_prompt_name"),
        truncate_dim=config.get("truncate_dim"),
    )


def _read_module(model: Model, recipe: Recipe, dotted: str, folder: str) -> Recipe:
    match _kind(dotted):
        case "Transformer":
            return _read_transformer(model, recipe, folder)
        case "Pooling":
            return _read_pooling(model, recipe, folder)
        case "Dense":
            return _read_dense(model, recipe, folder)
        case "Normalize":
            return replace(recipe, steps=(*recipe.steps, Normalize()))
        case "Dropout":  # no effect at inference
            return recipe
        case _:
            return _fault(
                recipe,
                f"modules.json has a module {dotted!r}, which task embedding cannot apply "
                "(it applies: Transformer, Pooling, Dense, Normalize); choose another model",
            )


def _kind(dotted: str) -> str:
    """Returns the class name of a module of sentence-transformers, whose dotted path differs by version."""
    return dotted.rsplit(".", 1)[-1] if dotted.startswith("sentence_transformers.") else ""


def _read_json(model: Model, folder: str, name: str) -> dict[str, Any] | None:
    return model.read_json(f"{folder}/{name}" if folder else name)


def _read_transformer(model: Model, recipe: Recipe, folder: str) -> Recipe:
    found = (_read_json(model, folder, name) for name in _TRANSFORMER_CONFIGS)
    config = next((values for values in found if values is not None), {})
    kind = config.get("transformer_task", "feature-extraction")
    if kind != "feature-extraction":
        recipe = _fault(
            recipe, f"its Transformer module is set to {kind!r}; task embedding needs 'feature-extraction'"
        )
    method = (config.get("modality_config") or {}).get("text", {}).get("method", "forward")
    if method != "forward":
        recipe = _fault(
            recipe, f"its Transformer module encodes text with {method!r}; task embedding needs 'forward'"
        )
    options = (config.get("processing_kwargs") or {}).get("text") or {}
    return replace(
        recipe,
        max_length=options.get("max_length") or config.get("max_seq_length"),
        lowercase=bool(config.get("do_lower_case", False)),
    )


def _read_pooling(model: Model, recipe: Recipe, folder: str) -> Recipe:
    config = _read_json(model, folder, "config.json") or {}
    modes = (
        config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    )
    poolings = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [mode for mode in poolings if mode not in POOLINGS]
    if unknown:
        known = ", ".join(POOLINGS)
        recipe = _fault(
            recipe, f"its pooling {unknown[0]!r} is not supported; set params.pooling to one of {known}"
        )
    return replace(recipe, poolings=poolings, include_prompt=bool(config.get("include_prompt", True)))


def _read_dense(model: Model, recipe: Recipe, folder: str) -> Recipe:
    config = _read_json(model, folder, "config.json")
    if config is None or "in_features" not in config or "out_features" not in config:
        return _fault(
            recipe, f"its Dense module has no {folder}/config.json with in_features and out_features"
        )
    dotted = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = dotted.rsplit(".", 1)[-1]
    ends = [config.get(name) or "sentence_embedding" for name in ("module_input_name", "module_output_name")]
    if not dotted.startswith("torch.nn.") or activation not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        recipe = _fault(
            recipe, f"{folder}/config.json names activation {dotted!r}; supported are torch.nn's {known}"
        )
    if ends != ["sentence_embedding"] * 2:
        recipe = _fault(
            recipe, f"its Dense module {folder!r} maps {ends[0]!r} to {ends[1]!r}, not the pooled vector"
        )
    # The weights of a Hub model are not downloaded before the job starts.
    if not getattr(model, "hub", False) and not (Path(model.folder) / folder / "model.safetensors").is_file():
        recipe = _fault(
            recipe,
            f"its Dense module has no {folder}/model.safetensors; load and save the model with "
            "sentence-transformers once, which writes that file",
        )
    dense = Dense(
        folder=folder,
        in_features=int(config["in_features"]),
        out_features=int(config["out_features"]),
        activation=activation,
        residual=bool(config.get("use_residual", False)),
    )
    return replace(recipe, steps=(*recipe.steps, dense))


def _fault(recipe: Recipe, sentence: str) -> Recipe:
    return replace(recipe, faults=(*recipe.faults, sentence))
