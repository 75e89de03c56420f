"""Determines which tasks a model supports, and which of them `task: auto` selects.

Uses the class names in transformers' AutoClass mappings, so that no weights and no model code are loaded to
check all tasks.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

from hfbatch.errors import SpecError
from hfbatch.tasks import TASKS, named, task_class
from hfbatch.tasks.base import Task, TaskConfig
from hfbatch.tasks.sentence_modules import task_of_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hfbatch.hub.models import Model

HEADLESS = ("AutoModel", "AutoModelForTextEncoding")
"""AutoClasses whose weights are part of every model with a head."""
MADE_FOR = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForDocumentQuestionAnswering",
)
"""AutoClasses that show a model's purpose where others, such as AutoModelForMaskedLM for BART, load it too."""
WITHOUT_ENCODER = ("AutoModelForMaskGeneration", "AutoModelForTextToWaveform")
"""AutoClasses that load the same class as AutoModel for some models, such as SAM and VITS."""
MODALITIES = frozenset({"text", "image", "audio", "video"})
WITH_MASKED_LM = frozenset(
    f"{kind}ForPreTraining"
    for kind in ("Albert", "Bert", "BigBird", "Ernie", "FNet", "MegatronBert", "MobileBert", "RoCBert")
)
"""Classes with several heads, one of which is that of AutoModelForMaskedLM."""


def misfits(task: Task) -> list[str]:
    """Returns an error that lists the supported tasks if the model does not support this one."""
    if fits(task):
        return []
    return [f"model {_shown(task)} does not support {task.name}; {_choice(tasks_of(task.model))}"]


def tasks_of(model: Model) -> list[str]:
    """Returns all tasks that the model supports: those of its own head first, then those that need no head."""
    able = [task for task in (_bare(name, model) for name in TASKS) if fits(task)]
    return [task.name for task in sorted(able, key=lambda task: task.auto_class in HEADLESS)]


def infer(model: Model) -> tuple[str, str]:
    """Infers the task of a model; returns its name and the source of the inference.

    Sources in order: sentence-transformers or ColBERT files, the `pipeline_tag` of the model card, a config with
    `task_specific_params` of one task only, the model's class.

    :raises SpecError: if no source names a task, or several tasks are equally plausible.
    """
    able = tasks_of(model)
    written = task_of_files(model)
    if written is not None and written in able:
        kind = "ColBERT" if model.read_json("modules.json") is None else "sentence-transformers"
        return written, f"its {kind} files"
    specific = list((model.read_json("config.json") or {}).get("task_specific_params") or {})
    hints = {"the pipeline_tag of its card": model.pipeline_tag()}
    hints["the task_specific_params of its config"] = specific[0] if len(specific) == 1 else None
    for source, name in hints.items():
        if name is not None and _task_named(name) in able:
            return name, source
    likely = [task for task in (_bare(name, model) for name in able) if task.general]
    for wins in (lambda task: task.auto_class not in HEADLESS, lambda task: task.auto_class in MADE_FOR):
        likely = [task for task in likely if wins(task)] or likely
    if len(likely) != 1 or not likely[0].config.architectures:
        raise SpecError(
            f"task auto: the files of model {model.name!r} do not name a single task; {_choice(able)}"
        )
    return likely[0].name, ", ".join(likely[0].config.architectures)


def fits(task: Task) -> bool:
    """Whether the task's AutoClass can load the model with all of its weights.

    A class unknown to transformers passes, since the engine refuses weights that lack layers.
    """
    config, table = task.config, _table(task.auto_class)
    if task.model.trust_remote_code and task.auto_class in (getattr(config, "auto_map", None) or {}):
        return True
    if config.model_type not in table:
        return False
    if task.auto_class in HEADLESS:
        return not _is_whole(config) and _reads_any(config.model_type, task.takes)
    if task.auto_class == "AutoModelForSeq2SeqLM" and not getattr(config, "is_encoder_decoder", False):
        return False  # speech models are in that mapping too
    return all(_has_head(name, task.auto_class) for name in config.architectures or [])


def _has_head(architecture: str, auto_class: str) -> bool:
    import transformers

    if architecture not in transformers.__all__:  # hasattr would import the model's code, and torch with it
        return True
    known = {name for names in _table(auto_class).values() for name in _tuple(names)}
    if auto_class == "AutoModelForMaskedLM":
        known |= WITH_MASKED_LM
    return architecture in known


def _is_whole(config: PretrainedConfig) -> bool:
    """Whether AutoModel loads a complete task model instead of an encoder."""
    model = _table("AutoModel").get(config.model_type)
    return model is not None and any(_table(name).get(config.model_type) == model for name in WITHOUT_ENCODER)


def _reads_any(model_type: str, modalities: frozenset[str]) -> bool:
    """Whether models of a type read one of the modalities; True if transformers has no processor for the type."""
    asked = sorted(modalities, reverse=True)  # text first: the tables of images take seconds to import
    others = sorted(MODALITIES - modalities)
    return any(_reads(model_type, kind) for kind in asked) or not any(
        _reads(model_type, kind) for kind in others
    )


def _reads(model_type: str, modality: str) -> bool:
    """Whether models of a type read a modality, by the tables of transformers' processors."""
    from transformers.models.auto import modeling_auto as models

    if modality == "text":
        from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES as tokenizers

        speech = (models.MODEL_FOR_CTC_MAPPING_NAMES, models.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
        texts = (tokenizers, models.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        return _in_any(model_type, texts) and not _in_any(model_type, speech)
    if modality == "image":
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as processors

        return _in_any(model_type, (processors, models.MODEL_FOR_IMAGE_MAPPING_NAMES))
    if modality == "audio":
        from transformers.models.auto.feature_extraction_auto import (
            FEATURE_EXTRACTOR_MAPPING_NAMES as extractors,
        )

        return model_type in extractors
    return model_type in models.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES


def _in_any(name: str, tables: Iterable[Container[str]]) -> bool:
    return any(name in table for table in tables)


def _table(auto_class: str) -> dict[str, str | tuple[str, ...]]:
    """Returns the mapping of an AutoClass from model type to class or classes."""
    import transformers

    return getattr(transformers, auto_class)._model_mapping._model_mapping


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _bare(name: str, model: Model) -> Task:
    """Returns a task without its required params, which is enough to find the class that loads the model."""
    cls = task_class(name)
    return cls(TaskConfig(model, cls.Params.model_construct()))


def _task_named(name: str) -> str | None:
    try:
        return named(name)[0].name
    except SpecError:
        return None


def _choice(able: list[str]) -> str:
    return (
        f"it supports: {', '.join(able)}"
        if able
        else "it supports none of the tasks that `hfbatch tasks` lists"
    )


def _shown(task: Task) -> str:
    return f"{task.model.name!r} ({', '.join(task.config.architectures or [task.config.model_type])})"
