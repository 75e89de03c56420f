"""The training process: goes on from the newest checkpoint, trains, leaves the best model.

Runs once in each process that Ray Train starts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hfbatch.train.adapters import ADAPTED
from hfbatch.train.callbacks import Tell
from hfbatch.train.details import read_details
from hfbatch.train.export import export_merged, export_model
from hfbatch.train.model import trainable
from hfbatch.train.order import TrainOrder
from hfbatch.train.training import Training, newest_for_all


def train(
    order: TrainOrder,
    local: Path,
    rank: int,
    world: int,
    tell: Tell,
    leaving: Callable[[], bool] | None = None,
) -> None:
    """Trains to the end in this process, one of `world`; what it leaves is in the output folder.

    :param local: an empty folder on this machine.
    :param tell: used by the first process alone.
    :param leaving: whether a machine is about to be taken away; the processes ask together, and hear the same.
    """
    training = Training(order, local, rank, world, tell, leaving)
    found = newest_for_all(training.checkpoints, local / "resume", rank, world)
    before = None if found is None else TrainerState.load_from_json(str(found / TRAINER_STATE_NAME))
    if before is not None and is_over(before):
        state = before  # nothing is left but to export
    elif order.spec.loop == "accelerate":
        from hfbatch.train.accelerate_loop import PlainLoop

        state = PlainLoop(training).run(found)
    else:
        from hfbatch.train.trainer import run_trainer

        state = run_trainer(training, found)
    best, merged = state.best_global_step or max(training.checkpoints.steps()), None
    if order.spec.method.name in ADAPTED:
        merged = export_merged(
            order, training.checkpoints, best, local / f"best-{rank}", rank == 0,
            lambda plain: training.measure(plain.to(training.args.device)),
        )  # fmt: skip
    elif rank == 0:
        export_model(order, training.checkpoints, best, local / "best")
    if rank == 0:
        changed, weights = trainable(training.model)
        tell(
            {
                "done": True,
                "best_step": best,
                "merged": merged,
                "resumed_at": before.global_step if before else 0,
                "log": state.log_history,
                "baseline": order.recipe.baseline(training.rows["eval"].table(order.recipe.scored)),
                "trainable": changed,
                "weights": weights,
                "details": read_details(training.checkpoints, best),
                "throughput": training.throughput(),
            }
        )


def is_over(state: TrainerState) -> bool:
    """Whether training had ended when a checkpoint was saved: by its steps, or early."""
    return state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
