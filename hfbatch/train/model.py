"""The model to train: loaded or new, with the config that labels and spec ask for, and the weights that are to change."""

from __future__ import annotations

from typing import Any

from hfbatch.engines.torch import grow_vocabulary
from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.train.recipes.base import Recipe


def build_model(spec: FinetuneSpec, recipe: Recipe) -> Any:
    """A transformers model in float32, in train mode, the weights that stay as they are without gradients.

    Layers that the checkpoint lacks, such as a head for new labels, begin random: the same for the same seed.
    """
    import transformers
    from transformers.trainer_utils import set_seed

    set_seed(spec.seed)
    loader = getattr(transformers, recipe.auto_class)
    config = config_of(spec, recipe)
    new: set[str] = set()
    if spec.model.scratch:
        model = loader.from_config(config)
    else:
        model, found = loader.from_pretrained(
            recipe.task.model.folder,
            config=config,
            dtype="float32",
            use_safetensors=True,
            trust_remote_code=spec.model.trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        new = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    if recipe.task.vocabulary is not None:
        grow_vocabulary(model, recipe.task.vocabulary, spec.seed)
    recipe.prepare(model)
    if spec.method.name == "head":
        freeze_base(model, new)
    recipe.prepare(model)
    return model.train()


def config_of(spec: FinetuneSpec, recipe: Recipe) -> Any:
    """The config of the model to train."""
    config = recipe.task.config
    for name, value in {**recipe.config_changes(), **spec.model.overrides}.items():
        setattr(config, name, value)
    return config


def freeze_base(model: Any, new: set[str]) -> None:
    """Leaves gradients to the head alone: what is not in the base model, and what the checkpoint lacked."""
    base = {id(weight) for weight in model.base_model.parameters()}
    for name, weight in model.named_parameters():
        weight.requires_grad = id(weight) not in base or name in new


def trainable(model: Any) -> tuple[int, int]:
    """Weights that training changes, and all of them."""
    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(count for count, changes in counts if changes), sum(count for count, _ in counts)
