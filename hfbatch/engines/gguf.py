"""Writes the model in a GGUF file to a folder as transformers saves it, once for each machine; every engine reads that.

The weights are written in float32, which holds every number of a GGUF file exactly. Does not import Ray.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfbatch.engines.exports import cached_export
from hfbatch.engines.quantization import quiet
from hfbatch.errors import SpecError, WorkerError, one_line
from hfbatch.hub.models import Model

CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
"""Which kind of model the weights are, by its config: the first of these that has it."""


def as_folder(model: Model, weights: bool = True) -> Model:
    """Returns a model with a folder of config, tokenizer and weights; the model itself, unless it is a GGUF file.

    :param weights: whether the weights are needed; a plan reads the other files alone.
    :raises SpecError: if the package gguf is not installed.
    """
    if not model.file:
        return model
    if find_spec("gguf") is None:
        raise SpecError("model.file needs gguf; pip install 'hfbatch[quantization]' on every node")
    key = {"engine": "gguf", "model": model.version, "auto_class": model.file, "weights": weights}
    write = _write_model if weights else _write_files
    folder = cached_export(key, ("torch", "transformers", "gguf"), lambda folder: write(model, folder))
    return replace(model, folder=str(folder))


def _write_files(model: Model, folder: Path) -> None:
    """Writes config, generation config, tokenizer and chat template. :raises SpecError: if transformers does not read the file."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    quiet()
    try:
        config = AutoConfig.from_pretrained(model.source, gguf_file=model.file)
    except Exception as error:  # of any class, with words that do not name the file
        raise SpecError(
            f"model.file: {model.file} cannot be read: {one_line(error)}; if it is incomplete, download it again"
        ) from error
    kind = _class_of(config)
    config.architectures = [kind.__name__]
    config.save_pretrained(folder)
    if kind.can_generate():
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model.source, gguf_file=model.file).save_pretrained(folder)


def _write_model(model: Model, folder: Path) -> None:
    """Writes all files. transformers refuses to save a model that it has read from a GGUF file; a plain one takes its weights.

    :raises WorkerError: if the file lacks weights, which transformers would initialise at random.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    small = as_folder(model, weights=False).folder
    config = AutoConfig.from_pretrained(small)
    kind = _class_of(config)
    found, loading = kind.from_pretrained(
        model.source, gguf_file=model.file, config=config, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise WorkerError(
            f"{model.file} lacks {len(missing)} weights of {kind.__name__}, such as {missing[0]}"
        )
    plain = AutoConfig.from_pretrained(small)
    with torch.device("meta"):
        made = kind._from_config(plain, dtype=torch.float32)
    made.load_state_dict(found.state_dict(), assign=True)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small).save_pretrained(folder)


def _class_of(config: Any) -> Any:
    """Returns the transformers class of the model."""
    import transformers

    kinds = (getattr(transformers, name)._model_mapping for name in CLASSES)
    found = next(kind[type(config)] for kind in kinds if type(config) in kind)
    return found[0] if isinstance(found, tuple) else found
