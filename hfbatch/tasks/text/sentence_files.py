"""Reads the sentence-transformers files of a model: how texts are prepared, and how token vectors become one vector.

Reads JSON only and reports unsupported settings; runs no code of the model and does not import torch. The files of sparse
encoders are read in `sparse_files`, those of late interaction in `late_files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hfbatch.tasks.sentence_modules import module_kind, task_of_files

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
class TextFiles:
    """What the files of every kind of model say about the preparation of texts."""

    found: bool = False
    """Whether the model has these files."""
    max_length: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    """Name of the prompt that is used by default."""
    faults: tuple[str, ...] = ()
    """Settings in these files that are not supported."""


Files = TypeVar("Files", bound=TextFiles)


@dataclass(frozen=True)
class Recipe(TextFiles):
    """The modules after the transformer, and the preparation of its input."""

    poolings: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    """Whether pooling includes the prompt's tokens."""
    steps: tuple[Normalize | Dense, ...] = ()
    """Modules applied to the pooled vector, in order."""
    truncate_dim: int | None = None


def read_recipe(model: Model) -> Recipe:
    """Reads the sentence-transformers files of a model; without them, returns mean pooling."""
    modules = model.read_json("modules.json")
    if modules is None:
        return Recipe()
    recipe = read_general(model, Recipe(found=True))
    if (task := task_of_files(model)) not in ("embedding", None):
        return add_fault(recipe, f"its sentence-transformers files are those of task {task}; use that task")
    for module in modules:
        recipe = _read_module(model, recipe, module["type"], module.get("path", ""))
    if not any(module_kind(module["type"]) == "Pooling" for module in modules):
        recipe = add_fault(
            recipe, "modules.json has no Pooling module; choose a model that returns one vector per text"
        )
    truncate_dim = (model.read_json("config_sentence_transformers.json") or {}).get("truncate_dim")
    return replace(recipe, truncate_dim=truncate_dim)


def read_general(model: Model, files: Files) -> Files:
    """Returns the files with the prompts of config_sentence_transformers.json."""
    config = model.read_json("config_sentence_transformers.json") or {}
    return replace(
        files,
        prompts={name: text for name, text in (config.get("prompts") or {}).items() if text},
        default_prompt=config.get("default_prompt_name"),
    )


def _read_module(model: Model, recipe: Recipe, dotted: str, folder: str) -> Recipe:
    match module_kind(dotted):
        case "Transformer":
            return read_transformer(model, recipe, folder)
        case "Pooling":
            return _read_pooling(model, recipe, folder)
        case "Dense":
            dense, faults = read_dense(model, folder)
            recipe = replace(recipe, faults=(*recipe.faults, *faults))
            return recipe if dense is None else replace(recipe, steps=(*recipe.steps, dense))
        case "Normalize":
            return replace(recipe, steps=(*recipe.steps, Normalize()))
        case "Dropout":  # no effect at inference
            return recipe
        case _:
            return add_fault(
                recipe,
                f"modules.json has a module {dotted!r}, which task embedding cannot apply "
                "(it applies: Transformer, Pooling, Dense, Normalize); choose another model",
            )


def read_in(model: Model, folder: str, name: str) -> dict[str, Any] | None:
    """Reads a JSON file in a module's folder; returns None if there is none."""
    return model.read_json(f"{folder}/{name}" if folder else name)


def transformer_config(model: Model, folder: str) -> dict[str, Any]:
    """Returns the config of a Transformer module, whose name differs by version; empty if there is none."""
    found = (read_in(model, folder, name) for name in _TRANSFORMER_CONFIGS)
    return next((values for values in found if values is not None), {})


def read_transformer(
    model: Model,
    files: Files,
    folder: str,
    task: str = "embedding",
    kind: str = "feature-extraction",
    usual: str = "feature-extraction",
) -> Files:
    """Returns the files with the length limit and the case of a Transformer module, and its faults.

    :param task: the name of the task, for errors.
    :param kind: the `transformer_task` that the task needs.
    :param usual: the one of a module that does not say.
    """
    config = transformer_config(model, folder)
    found = config.get("transformer_task", usual)
    if found != kind:
        files = add_fault(files, f"its Transformer module is set to {found!r}; task {task} needs {kind!r}")
    method = (config.get("modality_config") or {}).get("text", {}).get("method", "forward")
    if method != "forward":
        files = add_fault(
            files, f"its Transformer module encodes text with {method!r}; task {task} needs 'forward'"
        )
    options = (config.get("processing_kwargs") or {}).get("text") or {}
    return replace(
        files,
        max_length=options.get("max_length") or config.get("max_seq_length"),
        lowercase=bool(config.get("do_lower_case", False)),
    )


def _read_pooling(model: Model, recipe: Recipe, folder: str) -> Recipe:
    config = read_in(model, folder, "config.json") or {}
    modes = (
        config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    )
    poolings = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [mode for mode in poolings if mode not in POOLINGS]
    if unknown:
        known = ", ".join(POOLINGS)
        recipe = add_fault(
            recipe, f"its pooling {unknown[0]!r} is not supported; set params.pooling to one of {known}"
        )
    return replace(recipe, poolings=poolings, include_prompt=bool(config.get("include_prompt", True)))


def read_dense(
    model: Model, folder: str, vectors: str | None = "sentence_embedding"
) -> tuple[Dense | None, list[str]]:
    """Reads a Dense module; returns it, unless its config lacks its sizes, and its faults.

    :param vectors: what it has to be applied to, `sentence_embedding` or `token_embeddings`, as is one without names; None for
        whatever it names.
    """
    config = read_in(model, folder, "config.json")
    if config is None or "in_features" not in config or "out_features" not in config:
        return None, [f"its Dense module has no {folder}/config.json with in_features and out_features"]
    faults = []
    dotted = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = dotted.rsplit(".", 1)[-1]
    first = config.get("module_input_name") or vectors
    ends = [first, config.get("module_output_name") or first]
    if not dotted.startswith("torch.nn.") or activation not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        faults.append(f"{folder}/config.json names activation {dotted!r}; supported are torch.nn's {known}")
    if vectors is not None and ends != [vectors] * 2:
        what = "the pooled vector" if vectors == "sentence_embedding" else "the vectors of tokens"
        faults.append(f"its Dense module {folder!r} maps {ends[0]!r} to {ends[1]!r}, not {what}")
    # The weights of a Hub model are not downloaded before the job starts.
    if not getattr(model, "hub", False) and not (Path(model.folder) / folder / "model.safetensors").is_file():
        faults.append(
            f"its Dense module has no {folder}/model.safetensors; load and save the model with "
            "sentence-transformers once, which writes that file"
        )
    dense = Dense(
        folder=folder,
        in_features=int(config["in_features"]),
        out_features=int(config["out_features"]),
        activation=activation,
        residual=bool(config.get("use_residual", False)),
    )
    return dense, faults


def add_fault(files: Files, sentence: str) -> Files:
    """Returns the files with one more fault."""
    return replace(files, faults=(*files.faults, sentence))


def misfitting(steps: Iterable[Normalize | Dense], size: int | None) -> Iterator[tuple[Dense, int]]:
    """Yields the Dense modules that do not take what they are given, with the numbers that they get.

    :param size: numbers in a vector before the first module; 0 or None: not known.
    """
    for step in steps:
        if isinstance(step, Dense):
            if size and step.in_features != size:
                yield step, size
            size = step.out_features
