"""Checks a model's class names against its number of classes. Loads no weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hfbatch.hub.weights import shapes_of, weight_files
from hfbatch.tasks.base import Task

NAMED = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForVideoClassification",
)
"""AutoClasses whose models return one logit per class."""
OTHERS = (
    "AutoModelForObjectDetection",
    "AutoModelForSemanticSegmentation",
    "AutoModelForInstanceSegmentation",
    "AutoModelForUniversalSegmentation",
    "AutoModelForImageSegmentation",
    "AutoModelForVisualQuestionAnswering",
)
"""Other AutoClasses with named classes, whose logits have other shapes."""
HEADS = (
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "score.weight",
)
"""The last layer of most classification models: one row per class."""


def label_faults(task: Task) -> list[str]:
    """Returns an error if a class has no name, or if the numbers of names and of classes in the weights differ."""
    if task.auto_class not in (*NAMED, *OTHERS):
        return []
    name, names = task.model.name, task.config.id2label or {}
    missing = [index for index in range(len(names)) if index not in names]
    if missing:
        return [
            f"model {name!r}: id2label of config.json has {len(names)} classes but no name for class {missing[0]} "
            f"(it names: {', '.join(map(str, sorted(names)[:10]))}); number the classes from 0 without a gap"
        ]
    config = task.model.read_json("config.json") or {}
    count, given = config.get("num_labels"), config.get("id2label")
    if isinstance(count, int) and given and count != len(given):
        return [  # transformers then drops the names
            f"model {name!r}: config.json has num_labels {count}, and {len(given)} names in id2label; fix the one that is "
            "wrong"
        ]
    rows = _classes(task) if task.auto_class in NAMED and not _is_quantised(task) else None
    if rows is not None and rows != len(names):
        return [
            f"model {name!r}: its weights have {rows} classes, and id2label of config.json names {len(names)}; name "
            "each class there"
        ]
    return []


def label_notes(task: Task) -> list[str]:
    """Returns a note if several classes share a name."""
    if task.auto_class not in NAMED:
        return []
    counts = Counter(map(str, (task.config.id2label or {}).values()))
    twice = [name for name, count in counts.items() if count > 1]
    if not twice:
        return []
    return [
        f"{len(twice)} labels of the model name more than one class, such as {twice[0]!r}: the output does not "
        "distinguish such classes"
    ]


def _is_quantised(task: Task) -> bool:
    return getattr(task.config, "quantization_config", None) is not None


def _classes(task: Task) -> int | None:
    """Returns the number of classes in the last layer of the weights; None if unknown."""
    folder = Path(task.model.folder)
    for name in weight_files(folder):
        if (folder / name).is_file():
            for tensor, shape in shapes_of(folder / name):
                if tensor in HEADS and len(shape) == 2:
                    return shape[0]
    return None
