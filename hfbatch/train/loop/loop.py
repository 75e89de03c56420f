"""The training process: resumes from the newest checkpoint, trains, and exports the best model.

Runs once in each process that Ray Train starts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hfbatch.train.loop.adapters import ADAPTED
from hfbatch.train.loop.callbacks import Report
from hfbatch.train.loop.export import export_merged, export_model
from hfbatch.train.loop.model import trainable
from hfbatch.train.loop.per_example import read_details
from hfbatch.train.loop.training import Training, newest_for_all
from hfbatch.train.loop.worker_config import TrainWorkerConfig


def train(
    config: TrainWorkerConfig,
    local: Path,
    rank: int,
    world: int,
    report: Report,
    leaving: Callable[[], bool] | None = None,
) -> None:
    """Runs the training in this process, one of `world`; the results are in the output folder.

    :param local: an empty folder on this machine.
    :param report: sends news to the driver; only the first process calls it.
    :param leaving: whether a machine is about to be removed; all processes call it together and get the same answer.
    """
    training = Training(config, local, rank, world, report, leaving)
    found = newest_for_all(training.checkpoints, local / "resume", rank, world)
    before = None if found is None else TrainerState.load_from_json(str(found / TRAINER_STATE_NAME))
    if before is not None and is_over(before):
        state = before  # only the export is left
    elif config.spec.loop == "accelerate":
        from hfbatch.train.loop.accelerate_loop import PlainLoop

        state = PlainLoop(training).run(found)
    else:
        from hfbatch.train.loop.trainer import run_trainer

        state = run_trainer(training, found)
    best, merged = state.best_global_step or max(training.checkpoints.steps()), None
    if config.spec.method.name in ADAPTED:
        merged = export_merged(
            config, training.checkpoints, best, local / f"best-{rank}", rank == 0,
            lambda plain: training.measure(plain.to(training.args.device)),
        )  # fmt: skip
    elif rank == 0:
        export_model(config, training.checkpoints, best, local / "best")
    if rank == 0:
        changed, weights = trainable(training.model)
        report(
            {
                "done": True,
                "best_step": best,
                "merged": merged,
                "resumed_at": before.global_step if before else 0,
                "log": state.log_history,
                "baseline": config.recipe.baseline(training.rows["eval"].table(config.recipe.scored)),
                "trainable": changed,
                "weights": weights,
                "details": read_details(training.checkpoints, best),
                "throughput": training.throughput(),
            }
        )


def is_over(state: TrainerState) -> bool:
    """Returns whether training had ended when a checkpoint was saved: after its last step, or early."""
    return state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
