"""The model to train: loaded or new, with the config that labels and spec ask for, and the weights that are to change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hfbatch.data.filesystem import one_line
from hfbatch.engines.torch import grow_vocabulary
from hfbatch.errors import WorkerError
from hfbatch.finetune_spec import FinetuneSpec, MethodSpec
from hfbatch.train.adapters import ADAPTED, adapt, head_weights, quantisation, take_quantised
from hfbatch.train.recipes.base import Recipe


def build_model(spec: FinetuneSpec, recipe: Recipe) -> Any:
    """A transformers model in float32, in train mode, the weights that stay as they are without gradients.

    Layers that the checkpoint lacks, such as a head for new labels, begin random: the same for the same seed.
    With adapters, it is a PeftModel around it.
    """
    model, new = load_model(spec, recipe)
    if spec.method.name == "head":
        freeze_base(model, new)
    if spec.method.name in ADAPTED:
        model = adapt(model, spec, recipe, new)
    return model.train()


def load_model(spec: FinetuneSpec, recipe: Recipe) -> tuple[Any, set[str]]:
    """The model before a method has a say, but for the quantised weights of qlora; and names of new weights."""
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
    """A PeftModel in float32 with the adapters of a checkpoint, ready to be merged.

    The base of qlora is the quantised one, written out: adding adapters to 4-bit weights would round these again, and
    the original weights are not what the adapters were trained on.
    """
    from peft import PeftModel

    model, _ = load_model(spec.model_copy(update={"method": MethodSpec()}), recipe)
    if spec.method.name == "qlora":
        take_quantised(model, load_model(spec, recipe)[0])
    return PeftModel.from_pretrained(model, str(folder))


def load_weights(model: Any, folder: Path) -> None:
    """Puts the weights of a checkpoint into the model that wrote it: all of them, or its adapters.

    Many models write their weights under the names of their first release, so that older versions can read them; only
    `from_pretrained` knows these (transformers' conversion_mapping.py).

    :raises WorkerError: if the checkpoint has not all of them.
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
            "another version of transformers or peft? --overwrite trains anew"
        )


def config_of(spec: FinetuneSpec, recipe: Recipe) -> Any:
    """The config of the model to train."""
    config = recipe.task.config
    for name, value in {**recipe.config_changes(), **spec.model.overrides}.items():
        setattr(config, name, value)
    return config


def override_faults(spec: FinetuneSpec, recipe: Recipe) -> list[str]:
    """Fields of `model.overrides` that the model's config does not have, or with which no model can be built."""
    overrides = spec.model.overrides
    if not overrides:
        return []
    import torch
    import transformers

    config = copy.deepcopy(recipe.task.config)
    known = sorted(config.to_dict().keys() - transformers.PreTrainedConfig().to_dict().keys())
    faults = [
        f"model.overrides.{name} is no field of {type(config).__name__} (has: {', '.join(known)})"
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
    except Exception as error:  # noqa: BLE001 - configs and models raise what they like
        return [f"model.overrides {overrides} make no model: {one_line(error)}"]
    return []


def freeze_base(model: Any, new: set[str]) -> None:
    """Leaves gradients to the head alone: what is not in the base model, its pooler, and what the checkpoint lacked.

    A pooler, such as BERT's, only makes one vector out of what the base has found; sentence encoders and many other
    checkpoints hold one that nobody has trained.
    """
    changing = set(head_weights(model, new))
    pooler = None if model.base_model is model else getattr(model.base_model, "pooler", None)
    pooling = set() if pooler is None else set(map(id, pooler.parameters()))
    for name, weight in model.named_parameters():
        weight.requires_grad = name in changing or id(weight) in pooling


def trainable(model: Any) -> tuple[int, int]:
    """Weights that training changes, and all of them."""
    if hasattr(model, "get_nb_trainable_parameters"):  # of peft, which knows how many are in a byte
        return model.get_nb_trainable_parameters()
    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(count for count, changes in counts if changes), sum(count for count, _ in counts)
