"""Low-rank adapters on a frozen base (LoRA), which may be quantised (QLoRA), and their merge into a plain model.

Besides the adapters, these are trained (peft's `modules_to_save`): layers that the checkpoint lacks; the head, except
for models that predict tokens; and the embeddings of tokens that the spec adds. Does not import Ray.
"""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbatch.engines.layer_reads import read_layers
from hfbatch.errors import SpecError

# It recommends to install a faster kernel even if nothing is quantised.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from hfbatch.spec.finetune import FinetuneSpec
    from hfbatch.train.recipes.base import Recipe

ADAPTED = ("lora", "qlora")
"""Methods that train adapters."""
ADAPTER = "default"
"""peft's name of the only adapter."""


def method_faults(spec: FinetuneSpec, recipe: Recipe) -> list[str]:
    """Checks that method and optimizer can be used with this model. Reads names of weights, but no weights."""
    method, faults = spec.method, []
    if find_spec("bitsandbytes") is None:
        users = [f"method {method.name}"] * (method.name == "qlora")
        users += ["schedule.optimizer adamw_8bit"] * (spec.schedule.optimizer == "adamw_8bit")
        faults += [f"{user} needs bitsandbytes: pip install bitsandbytes" for user in users]
    if method.name == "qlora":
        faults += _quantisation_faults(spec, recipe)
    if method.name == "full" or faults:
        return faults
    model, new = skeleton(spec, recipe)
    if method.name == "head":
        if head_weights(model, new):
            return []
        return [
            f"method head: {type(model).__name__} has no separate head (its output layer, if it has one, shares the "
            "weights of its embeddings); choose method lora or full"
        ]
    linear = linear_layers(model, trained_modules(model, new))
    if not linear:
        return [
            f"method {method.name}: {type(model).__name__} has no linear layers below its head; choose full"
        ]
    known = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()})
    return [
        f"method.targets: no linear layer below the head is named {target!r}; choose among: {', '.join(known)}"
        for target in method.targets or ()
        if not any(is_named(name, target) for name in linear)
    ]


def _quantisation_faults(spec: FinetuneSpec, recipe: Recipe) -> list[str]:
    faults = []
    if spec.model.scratch:
        faults.append("method qlora freezes the base, which is random with model.scratch; choose method full")
    if spec.workers.strategy == "fsdp":
        faults.append("workers.strategy fsdp cannot shard quantised weights; choose ddp for method qlora")
    if getattr(recipe.task.config, "quantization_config", None) is not None:
        faults.append(f"method qlora: {spec.model.name!r} is quantised already; give the original model")
    return faults


def skeleton(spec: FinetuneSpec, recipe: Recipe) -> tuple[Any, set[str]]:
    """Returns the model on the meta device, and the names of the weights that its checkpoint lacks.

    A checkpoint that is not on this machine yet counts as complete.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()  # else it logs a long report of new weights
    transformers.utils.logging.disable_progress_bar()
    loader = getattr(transformers, recipe.auto_class)
    config, trusted = copy.deepcopy(recipe.task.config), spec.model.trust_remote_code
    folder = Path(recipe.task.model.folder)
    if spec.model.scratch or not any(folder.glob("*.safetensors")):
        with torch.device("meta"):
            return loader.from_config(config, trust_remote_code=trusted), set()
    model, found = loader.from_pretrained(
        folder,
        config=config,
        device_map="meta",
        use_safetensors=True,
        trust_remote_code=trusted,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model, set(found["missing_keys"])


def head_weights(model: Any, new: set[str]) -> list[str]:
    """Returns the names of the weights that are not in the base model, or that its checkpoint lacks.

    :param new: names of the weights that the checkpoint lacks.
    """
    base = {id(weight) for weight in model.base_model.parameters()}
    output = model.get_output_embeddings()
    if model.base_model is model and output is not None:  # such as T5, which has no separate base model
        base -= {id(output.weight)} - {id(model.get_input_embeddings().weight)}
    return [name for name, weight in model.named_parameters() if id(weight) not in base or name in new]


def trained_modules(model: Any, new: set[str]) -> list[str]:
    """Returns the names of the modules that are fully trained besides adapters.

    The output layer of a model that predicts tokens stays frozen if the checkpoint has it, since it is as large as
    the embeddings; so do weights next to other layers, such as wav2vec2's embedding of masked frames.

    :raises SpecError: for a new layer that shares a weight with the frozen base.
    """
    weights = dict(model.named_parameters())
    trained = set(head_weights(model, new))
    if model.get_output_embeddings() is not None:
        trained &= new
    owners = {name.rpartition(".")[0] for name in trained}
    frozen = {id(weight) for name, weight in weights.items() if name not in trained}
    shared = {
        owner
        for owner in owners
        if any(id(weight) in frozen for weight in model.get_submodule(owner).parameters())
    }
    base = {id(weight) for weight in model.base_model.parameters()}
    for name in trained:
        if name.rpartition(".")[0] in shared and id(weights[name]) not in base:
            raise SpecError(
                f"adapters: {name} cannot be trained without layers of the base that share its module; choose method full"
            )
    owners -= shared
    return sorted(owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners))


def linear_layers(model: Any, beside: list[str]) -> list[str]:
    """Returns the names of all linear layers of the base model that it calls: an adapter on another has no effect.

    :param beside: modules to leave out, with their submodules.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    base, output = set(map(id, model.base_model.modules())), model.get_output_embeddings()
    not_called = read_layers(model, values=True)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (Linear, Conv1D))
        and name not in not_called
        and id(module) in base
        and module is not output
        and not any(name == other or name.startswith(f"{other}.") for other in beside)
    ]


def is_named(name: str, target: str) -> bool:
    """Returns whether a target names a module: by its full name, or by the last parts of it."""
    return name == target or name.endswith(f".{target}")


def quantisation(spec: FinetuneSpec, recipe: Recipe) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that quantise the linear layers of the base."""
    from torch.nn import Linear
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    model, new = skeleton(spec, recipe)
    chosen = set(linear_layers(model, trained_modules(model, new))) - read_layers(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, (Linear, Conv1D))]
    options: dict[str, Any] = {"llm_int8_skip_modules": [name for name in linear if name not in chosen]}
    if spec.method.bits == 8:
        options["load_in_8bit"] = True
    else:
        options |= {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        }  # fmt: skip
    return {"quantization_config": BitsAndBytesConfig(**options)}


def adapt(model: Any, spec: FinetuneSpec, recipe: Recipe, new: set[str]) -> Any:
    """Returns a PeftModel with new adapters, initialised to have no effect, and frozen base weights.

    :param new: names of the weights that the checkpoint lacked.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    method, beside = spec.method, trained_modules(model, new)
    targets = linear_layers(model, beside)
    if method.targets is not None:
        targets = [name for name in targets if any(is_named(name, target) for target in method.targets)]
    if method.name == "qlora":
        keep_packing(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer does that
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=targets,
        modules_to_save=beside or None,
        trainable_token_indices=added_tokens(model, recipe),
    )
    adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    if config.trainable_token_indices:
        share_new_tokens(adapted.get_base_model())
    # Without the name of its base, peft does not request its vocabulary size from the Hub at each checkpoint.
    adapted.peft_config[ADAPTER].base_model_name_or_path = ""
    return adapted


def keep_packing(model: Any) -> None:
    """Keeps 4-bit weights unchanged: on CPUs with AVX512-BF16, bitsandbytes would repack them for evaluation.

    Repacking rounds their scales in place, and fails for layers whose sizes are not multiples of 64 and 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def added_tokens(model: Any, recipe: Recipe) -> dict[str, list[int]] | None:
    """Returns the ids of the tokens that the spec adds, by names of the embedding layers; None if there are none."""
    size = recipe.task.vocabulary
    if size is None:
        return None
    layers, output = [model.get_input_embeddings()], model.get_output_embeddings()
    if output is not None and output.weight is not layers[0].weight:
        layers.append(output)
    ids = list(range(size - recipe.task.added_tokens, size))
    return {name: ids for name, module in model.named_modules() if any(module is layer for layer in layers)}


def share_new_tokens(model: Any) -> None:
    """Makes all modules that share the embedding layer use the new tokens; peft only wraps the one it was given.

    :raises SpecError: for a layer that shares only the embedding's weights, and so would miss the new tokens.
    """
    from peft.utils.other import TrainableTokensWrapper

    trained = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    tables = {id(module.original_module): module for module in trained}
    weights = {id(module.original_module.weight) for module in trained}
    parts = {id(part) for module in trained for part in module.modules()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name.endswith(".token_adapter.base_layer"):
            continue
        if id(module) in tables:
            model.set_submodule(name, tables[id(module)])
        elif id(module) not in parts and id(module._parameters.get("weight")) in weights:
            raise SpecError(
                f"adapters cannot train new tokens in {name}, which shares its weights with the embeddings; "
                "choose method full"
            )


def take_quantised(model: Any, quantised: Any) -> None:
    """Copies the dequantised weights of a quantised model, on which adapters were trained, into a plain model.

    :param quantised: a model that has not run a forward pass yet.
    """
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight

    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, (Linear4bit, Linear8bitLt)):
                weight, target = dequantize_module_weight(module), model.get_submodule(name)
                target.weight.copy_(weight.T if is_transposed(target) else weight)


def is_transposed(module: Any) -> bool:
    """Returns whether a layer stores its weight as [in, out], as those of GPT-2 do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def save_adapter(adapted: Any, name: str, revision: str | None, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    :param name: name of the base as the user gave it, since a local folder is of no use elsewhere.
    :param revision: its commit on the Hub.
    """
    config = adapted.peft_config[ADAPTER]
    config.base_model_name_or_path, config.revision = name, revision
    adapted.save_pretrained(folder, save_embedding_layers=False)
