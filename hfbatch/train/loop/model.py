"""Builds the model to train: loads or initialises it, applies labels and overrides, and freezes weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hfbatch.data.filesystem import one_line
from hfbatch.engines.torch import grow_vocabulary
from hfbatch.errors import WorkerError
from hfbatch.spec.finetune import FinetuneSpec, MethodSpec
from hfbatch.train.loop.adapters import ADAPTED, adapt, head_weights, quantisation, take_quantised
from hfbatch.train.recipes.base import Recipe


def build_model(spec: FinetuneSpec, recipe: Recipe) -> Any:
    """Returns a transformers model in float32 and in train mode; frozen weights do not require gradients.

    Layers that the checkpoint lacks, such as a head for new labels, are initialised randomly from the seed. With
    adapters, a PeftModel wraps the model.
    """
    model, new = load_model(spec, recipe)
    if spec.method.name == "head":
        freeze_base(model, new)
    if spec.method.name in ADAPTED:
        model = adapt(model, spec, recipe, new)
    return model.train()


def load_model(spec: FinetuneSpec, recipe: Recipe) -> tuple[Any, set[str]]:
    """Loads the model before freezing and adapters, quantised for qlora; also returns the names of new weights."""
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
            **(quantisation(spec, recipe) if spec.method.name == "qlora" else {}),
        )
        new = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    if recipe.task.vocabulary is not None:
        grow_vocabulary(model, recipe.task.vocabulary, spec.seed)
    recipe.prepare(model)
    return model, new


def load_adapted(spec: FinetuneSpec, recipe: Recipe, folder: Path) -> Any:
    """Returns a PeftModel in float32 with the adapters of a checkpoint, ready to be merged.

    For qlora, the base is the dequantised one: merging adapters into 4-bit weights would round these again, and the
    adapters were not trained on the original weights.
    """
    from peft import PeftModel

    model, _ = load_model(spec.model_copy(update={"method": MethodSpec()}), recipe)
    if spec.method.name == "qlora":
        take_quantised(model, load_model(spec, recipe)[0])
    return PeftModel.from_pretrained(model, str(folder))


def load_weights(model: Any, folder: Path) -> None:
    """Loads the weights of a checkpoint, all or those of adapters, into the model that wrote it.

    Many models save weights under the names of their first release, so that older versions can read them; only
    `from_pretrained` maps these names (transformers' conversion_mapping.py).

    :raises WorkerError: if the checkpoint lacks some of them.
    """
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

        weights = load_peft_weights(str(folder))
        unknown = sorted(get_peft_model_state_dict(model).keys() ^ weights.keys())
        set_peft_model_state_dict(model, weights)
    else:
        saved, loading = type(model).from_pretrained(
            str(folder), config=model.config, dtype="float32", use_safetensors=True, output_loading_info=True
        )
        unknown = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
        model.load_state_dict(saved.state_dict())
    if unknown:
        raise WorkerError(
            f"{len(unknown)} weights of the checkpoint do not fit the model, such as {unknown[0]}; was it written by "
            "another version of transformers or peft? --overwrite starts the training again"
        )


def config_of(spec: FinetuneSpec, recipe: Recipe) -> Any:
    """Returns the config of the model to train."""
    config = recipe.task.config
    for name, value in {**recipe.config_changes(), **spec.model.overrides}.items():
        setattr(config, name, value)
    return config


def override_faults(spec: FinetuneSpec, recipe: Recipe) -> list[str]:
    """Checks that the model's config has the fields of `model.overrides`, and that a model can be built with them."""
    overrides = spec.model.overrides
    if not overrides:
        return []
    import torch
    import transformers

    config = copy.deepcopy(recipe.task.config)
    known = sorted(config.to_dict().keys() - transformers.PreTrainedConfig().to_dict().keys())
    faults = [
        f"model.overrides.{name} is not a field of {type(config).__name__} (has: {', '.join(known)})"
        for name in overrides
        if not hasattr(config, name)
    ]
    if faults:
        return faults
    try:
        for name, value in overrides.items():
            setattr(config, name, value)
        with torch.device("meta"):
            loader = getattr(transformers, recipe.auto_class)
            loader.from_config(config, trust_remote_code=spec.model.trust_remote_code)
    except Exception as error:  # noqa: BLE001 - configs and models raise any exception
        return [f"no model can be built with model.overrides {overrides}: {one_line(error)}"]
    return []


def freeze_base(model: Any, new: set[str]) -> None:
    """Freezes all weights but those outside of the base model, of its pooler, and those that the checkpoint lacks.

    A pooler, such as BERT's, reduces the output of the base to one vector; in the checkpoints of sentence encoders
    and many other models it is untrained.
    """
    changing = set(head_weights(model, new))
    pooler = None if model.base_model is model else getattr(model.base_model, "pooler", None)
    pooling = set() if pooler is None else set(map(id, pooler.parameters()))
    for name, weight in model.named_parameters():
        weight.requires_grad = name in changing or id(weight) in pooling


def trainable(model: Any) -> tuple[int, int]:
    """Returns the number of trainable weights, and of all weights."""
    if hasattr(model, "get_nb_trainable_parameters"):  # of peft, which counts packed 4-bit weights
        return model.get_nb_trainable_parameters()
    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(count for count, changes in counts if changes), sum(count for count, _ in counts)
