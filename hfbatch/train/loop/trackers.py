"""Experiment trackers for losses and metrics: TensorBoard, W&B, MLflow, by transformers' callbacks."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from hfbatch.data.filesystem import is_local, join, open_filesystem
from hfbatch.spec.finetune import FinetuneSpec

if TYPE_CHECKING:
    from transformers import TrainerCallback

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Values of `report_to`, and the packages that provide their modules."""
FOLDER = "tensorboard"
"""Folder of the logs in the output."""


def reporting_faults(spec: FinetuneSpec) -> list[str]:
    """Checks that the trackers of `report_to` are installed and configured."""
    faults = [
        f"report_to {name!r} needs a package that is missing; run `pip install {PACKAGES[name]}`, or leave it out of "
        "report_to"
        for name in spec.report_to
        if find_spec(name) is None
    ]
    if "mlflow" in spec.report_to and not os.environ.get("MLFLOW_TRACKING_URI"):
        faults.append(
            "report_to 'mlflow' needs the URL of a server; set MLFLOW_TRACKING_URI, such as to http://host:5000, for "
            "the processes of the cluster too"
        )
    if "wandb" in spec.report_to and not _may_use_wandb():
        faults.append(
            "report_to 'wandb' needs a key; set WANDB_API_KEY, or WANDB_MODE=offline to keep runs in files, for the "
            "processes of the cluster too"
        )
    return faults


def _may_use_wandb() -> bool:
    """Returns whether W&B finds a key in one of the places where it looks for one, or needs none."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    return offline or "WANDB_API_KEY" in os.environ or netrc.is_file()


def reporters(spec: FinetuneSpec, local: Path) -> list[TrainerCallback]:
    """Returns the callbacks of `report_to`, for the first process only.

    :param local: a folder on this machine for logs that are copied to the output.
    """
    from transformers.integrations import MLflowCallback, WandbCallback

    made: dict[str, Any] = {"tensorboard": lambda: tensorboard(spec, local)}
    made |= {"wandb": WandbCallback, "mlflow": MLflowCallback}
    return [made[name]() for name in spec.report_to]


def tensorboard(spec: FinetuneSpec, local: Path) -> TrainerCallback:
    """Returns a callback that logs to the output: directly if it is local, else copied at checkpoints and the end."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    fs, root = open_filesystem(join(spec.output, FOLDER))
    folder = Path(root) if is_local(fs) else local / FOLDER

    class TensorBoard(TensorBoardCallback):
        """Purges the logged steps that a resumed training repeats."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            """Opens a new log file."""
            again = state.global_step + 1 if state.global_step else None
            self.tb_writer = SummaryWriter(str(folder), purge_step=again)
            super().on_train_begin(args, state, control, **more)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Copies the logs written so far."""
            if not is_local(fs):
                fs.create_dir(root, recursive=True)
                pafs.copy_files(str(folder), root, pafs.LocalFileSystem(), fs)

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            """Closes the file."""
            super().on_train_end(args, state, control, **more)
            self.on_save(args, state, control)

    return TensorBoard()
