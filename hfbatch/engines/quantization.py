"""Loads models whose weights are quantised, by the spec or in the checkpoint, and says which can be. Does not import Ray.

What is quantised: the weights of the linear layers in the base model. What keeps the dtype of the model: embeddings, norms,
biases, convolutions, experts that are no linear layers, the output embeddings (`lm_head`), also those of a decoder inside the
model, all layers outside the base model (the heads of classifiers and taggers), and layers whose weights the model reads
itself (see `layer_reads`).
transformers by itself leaves out the output embeddings alone.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbatch.engines.base import EngineConfig
from hfbatch.engines.layer_reads import read_layers
from hfbatch.errors import one_line
from hfbatch.hub.jsonfiles import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

BITSANDBYTES = ("int8", "nf4", "fp4")
SHARED = ("bitsandbytes", "torchao")
"""Methods whose layers several threads may call at once; those of others change in a call, or were not tried."""
BLOCK, ROWS = 64, 32
"""bitsandbytes' fused 4-bit product on CPUs needs inputs and outputs in multiples of these."""


def quantization_arguments(config: EngineConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` for quantised weights; none for a checkpoint as it is.

    Compressed tensors are written out in the dtype of the model: transformers has no kernels for them, and would write them out
    in the first call.
    """
    if config.quantization == "none":
        if checkpoint_method(config.folder) != "compressed-tensors":
            return {}
        from transformers import CompressedTensorsConfig

        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    from transformers import AutoConfig

    remote = config.trust_remote_code
    settings = AutoConfig.from_pretrained(config.folder, trust_remote_code=remote)
    kept = kept_layers(skeleton_of(settings, config.auto_class, remote))
    return {"quantization_config": _settings(config.quantization, dtype, kept)}


@contextmanager
def embeddings_optional() -> Iterator[None]:
    """Lets torchao quantise models that have no input embeddings, such as those of images and audio.

    transformers asks the model for them before each weight, and for such a model that raises an error.
    """
    from transformers import PreTrainedModel

    own = PreTrainedModel.get_input_embeddings

    def embeddings(model: Any) -> Any:
        """Returns the input embeddings, if there are any."""
        try:
            return own(model)
        except NotImplementedError:
            return None

    PreTrainedModel.get_input_embeddings = embeddings
    try:
        yield
    finally:
        PreTrainedModel.get_input_embeddings = own


def save(model: Any, folder: Path) -> None:
    """Writes a model.

    torchao lists all tensors of a file, and does not read one whose name has no dot, such as CLIP's `logit_scale`. It is left out
    of the list, which a plain tensor does not need.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and method_of(model) == "torchao":
        own = quantizer.get_state_dict_and_metadata

        def listed(model: Any) -> tuple[dict[str, Any], dict[str, str]]:
            """Returns the tensors, and the list without these."""
            state, about = own(model)
            names = [name for name in json.loads(about["tensor_names"]) if "." in name]
            return state, {**about, "tensor_names": json.dumps(names)}

        quantizer.get_state_dict_and_metadata = listed
    model.save_pretrained(folder)


def checkpoint_method(folder: str) -> str | None:
    """Returns by what the weights of a checkpoint are quantised, if they are."""
    given = (read_object(Path(folder, "config.json")) or {}).get("quantization_config")
    if not isinstance(given, dict):
        return None
    return str(given.get("quant_method") or "bitsandbytes")  # which older files do not name


def _settings(quantization: str, dtype: torch.dtype, kept: list[str]) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    if quantization in BITSANDBYTES:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=quantization == "nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    kinds = {
        "int8_weight_only": Int8WeightOnlyConfig,
        "int8_dynamic": Int8DynamicActivationInt8WeightConfig,
    }
    return TorchAoConfig(kinds[quantization](), modules_to_not_convert=kept)


def skeleton_of(settings: PretrainedConfig, auto_class: str, trust_remote_code: bool = False) -> Any:
    """Returns the model without memory for its weights."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(settings, trust_remote_code=trust_remote_code)


def kept_layers(model: Any) -> list[str]:
    """Returns the names of the layers that are not quantised: output embeddings, also those of a decoder inside the model, other
    layers that share a weight, those outside the base model, and those whose weights the model reads itself.
    """
    from transformers import PreTrainedModel

    layers, base = dict(model.named_modules()), model.base_model
    heads = {
        id(part.get_output_embeddings()) for part in layers.values() if isinstance(part, PreTrainedModel)
    }
    weights = {name: id(getattr(layer, "weight", layer)) for name, layer in layers.items()}
    owners = Counter(weights.values())
    kept = {name for name, layer in layers.items() if id(layer) in heads or owners[weights[name]] > 1}
    if base is not model:
        kept |= {name for name, layer in model.named_children() if layer is not base}
    return sorted(kept | read_layers(model))


def linear_layers(model: Any, quantization: str) -> list[str]:
    """Returns the names of the layers of a model, or of its skeleton, that a quantisation applies to."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D) if quantization in BITSANDBYTES else (torch.nn.Linear,)
    kept = kept_layers(model)
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and not any(name == one or name.startswith(f"{one}.") for one in kept)
    ]


def quantization_faults(
    settings: PretrainedConfig, auto_class: str, trust_remote_code: bool, engine: str, quantization: str
) -> list[str]:
    """Returns errors for a model that has no layers to quantise. Loads no weights."""
    if linear_layers(skeleton_of(settings, auto_class, trust_remote_code), quantization):
        return []
    others = "int8, nf4, fp4" if quantization not in BITSANDBYTES else "none"
    return [
        f"engine.quantization {quantization} of engine {engine} quantises linear layers, and {settings.model_type} models "
        f"have none that it knows; set engine.quantization to {others}"
    ]


def settings_faults(model: str, given: dict[str, Any]) -> list[str]:
    """Returns the fault of a checkpoint's settings that their class in transformers does not take. Loads no weights.

    :param model: its name, for errors.
    """
    quiet()
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        AutoQuantizationConfig.from_dict(dict(given))
    except Exception as error:  # noqa: BLE001 - of any class: some settings are used before they are checked
        return [
            f"model {model!r}: config.json has a quantization_config that transformers does not read ({one_line(error)}); "
            "download the file again, or give the model without quantisation"
        ]
    return []


def method_of(model: Any) -> str | None:
    """Returns by what the weights of a model are quantised, if they are."""
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))


def may_share(model: Any) -> bool:
    """Whether several threads may call the model at once, as far as its quantisation is concerned."""
    method = method_of(model)
    return method is None or method in SHARED or is_written_out(model)


def is_written_out(model: Any) -> bool:
    """Whether the weights of a quantised checkpoint were written out in the dtype of the model."""
    settings = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return bool(getattr(settings, "dequantize", False))


def finish_loading(model: Any, dtype: torch.dtype) -> None:
    """Brings the layers of bitsandbytes into the state of their first call, which threads must not share.

    Other weights of a quantised checkpoint are cast to dtype: transformers leaves some in that of the checkpoint. A 4-bit layer on a CPU with AVX512-BF16 then computes in bfloat16 whatever the dtype of the model, and fails for sizes that
    are not multiples of BLOCK and ROWS; it does so only where the model is in bfloat16 and the sizes fit.
    """
    import torch

    if getattr(model, "quantization_method", None) in (None, "bitsandbytes"):
        _cast(model, dtype)
    for layer in model.modules():
        if getattr(layer, "quant_state", None) is not None:
            layer.compute_dtype = dtype
        if hasattr(layer, "init_8bit_state") and layer.weight.CB is not None:
            layer.init_8bit_state()
            _take_any_dimensions(layer)
        elif getattr(layer, "support_avx512bf16_for_cpu", False):
            fits = layer.in_features % BLOCK == 0 and layer.out_features % ROWS == 0
            layer.support_avx512bf16_for_cpu = fits and layer.compute_dtype == torch.bfloat16
            if layer.support_avx512bf16_for_cpu and layer.weight.device.type == "cpu":
                with torch.inference_mode():
                    layer(torch.zeros(1, layer.in_features, dtype=layer.compute_dtype))


def _take_any_dimensions(layer: Any) -> None:
    """Has a layer of LLM.int8 take tensors of four dimensions and more, as some models of images give them; it takes up to three."""
    forward = layer.forward

    def flattened(inputs: torch.Tensor) -> Any:
        """Computes the rows of a tensor as those of a matrix."""
        if inputs.dim() <= 3:
            return forward(inputs)
        return forward(inputs.flatten(0, -2)).unflatten(0, inputs.shape[:-1])

    layer.forward = flattened


def _cast(model: Any, dtype: torch.dtype) -> None:
    import torch

    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, weight in model.named_parameters():
        if (
            type(weight) is torch.nn.Parameter
            and weight.is_floating_point()
            and not kept & {*name.split(".")}
        ):
            weight.data = weight.data.to(dtype)


def quiet() -> None:
    """Silences warnings of bitsandbytes for every layer and batch, and those of torchao's import, which says what it lacks.

    transformers imports torchao with the first model, whether it is quantised or not.
    """
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "You passed `quantization_config`")  # to write the weights out
