"""The finished model: a folder that transformers loads, in the output. Knows nothing of Ray."""

from __future__ import annotations

from pathlib import Path

import pyarrow.fs as pafs

from hfbatch.data.filesystem import join, open_filesystem
from hfbatch.errors import WorkerError
from hfbatch.train.checkpoints import MANIFEST, Checkpoints
from hfbatch.train.details import DETAILS
from hfbatch.train.order import TrainOrder

OF_TRAINING = (
    "optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "scaler", DETAILS, MANIFEST,
)  # fmt: skip
"""How the names of files begin that are for going on with training alone."""


def export_model(order: TrainOrder, checkpoints: Checkpoints, step: int, local: Path) -> None:
    """Puts the model of a checkpoint into the output's folder `model`, whole before it has its config.

    :raises WorkerError: if the checkpoint is gone.
    """
    found = checkpoints.fetch(step, local)
    if found is None:
        raise WorkerError(
            f"the best checkpoint, of step {step}, is not as it was written; run again to train on"
        )
    fs, root = open_filesystem(join(order.spec.output, "model"))
    fs.create_dir(root, recursive=True)
    names = [path.name for path in sorted(found.iterdir()) if not path.name.startswith(OF_TRAINING)]
    for name in sorted(names, key=lambda name: name == "config.json"):
        pafs.copy_files(str(found / name), f"{root}/{name}", pafs.LocalFileSystem(), fs)
