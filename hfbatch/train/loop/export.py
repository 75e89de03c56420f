"""Exports the finished model to the output, as a folder that transformers loads. Does not import Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from hfbatch.data.filesystem import join, open_filesystem
from hfbatch.errors import WorkerError
from hfbatch.train.loop.adapters import save_adapter
from hfbatch.train.loop.checkpoints import MANIFEST, Checkpoints
from hfbatch.train.loop.model import load_adapted
from hfbatch.train.loop.per_example import DETAILS
from hfbatch.train.loop.worker_config import TrainWorkerConfig

OF_TRAINING = (
    "optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "scaler", "pytorch_model_fsdp", DETAILS, MANIFEST,
)  # fmt: skip
"""Prefixes of the names of files that only serve to resume training."""


def export_model(config: TrainWorkerConfig, checkpoints: Checkpoints, step: int, local: Path) -> None:
    """Exports the model of a checkpoint to the output's folder `model`. :raises WorkerError: if it is gone."""
    found = best_of(checkpoints, step, local)
    config.recipe.complete(found)
    config.check()
    put(found, join(config.spec.output, "model"), last="config.json")


def export_merged(
    config: TrainWorkerConfig,
    checkpoints: Checkpoints,
    step: int,
    local: Path,
    first: bool,
    measure: Callable[[Any], dict[str, float]],
) -> dict[str, float]:
    """Exports the adapters of a checkpoint to the folder `adapter`, and the model merged with them to `model`.

    Runs in every process, since all processes evaluate the merged model together.

    :param first: whether this process is the first, which writes the files.
    :param measure: computes the metrics of a model.
    :returns: metrics of the merged model.
    :raises WorkerError: if the checkpoint is gone.
    """
    recipe, base = config.recipe, config.model
    adapted = load_adapted(config.spec, recipe, best_of(checkpoints, step, local))
    if first:
        save_adapter(adapted, base.name, base.commit if base.hub else None, local / "adapter")
        recipe.processor.save_pretrained(local / "adapter")
        config.check()
        put(local / "adapter", join(config.spec.output, "adapter"), last="adapter_config.json")
    merged = adapted.merge_and_unload(safe_merge=True)
    if first:  # before the evaluation, which moves the whole model to a device
        merged.save_pretrained(local / "merged")
        recipe.processor.save_pretrained(local / "merged")
        recipe.complete(local / "merged")
        config.check()
        put(local / "merged", join(config.spec.output, "model"), last="config.json")
    return measure(merged)


def best_of(checkpoints: Checkpoints, step: int, local: Path) -> Path:
    """Copies the best checkpoint to this machine. :raises WorkerError: if it is gone."""
    found = checkpoints.fetch(step, local)
    if found is None:
        raise WorkerError(
            f"the best checkpoint, of step {step}, is damaged or missing; --overwrite starts the training again"
        )
    return found


def put(folder: Path, url: str, last: str) -> None:
    """Copies a model's files to a folder or URL, without those of training. :param last: the file to write last."""
    fs, root = open_filesystem(url)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in files if not path.name.startswith(OF_TRAINING)]
    for name in sorted(names, key=lambda name: name == last):
        fs.create_dir(f"{root}/{name}".rpartition("/")[0], recursive=True)
        pafs.copy_files(str(folder / name), f"{root}/{name}", pafs.LocalFileSystem(), fs)
