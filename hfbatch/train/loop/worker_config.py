"""Configuration of the training processes, as plain values from which each builds the same recipe and model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from hfbatch.data.filesystem import join
from hfbatch.data.media import NO_FILES
from hfbatch.data.media_files import RowFiles
from hfbatch.errors import SpecError
from hfbatch.hub.models import Model
from hfbatch.output.layout import INNER
from hfbatch.output.lock import TAKEOVER_S, Claim
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.spec.location import WITH_SECRETS, Location
from hfbatch.tasks import task_class
from hfbatch.tasks.base import TaskConfig
from hfbatch.train.recipes import recipe_class
from hfbatch.train.recipes.base import Recipe

PER_DEVICE = 32
"""Most rows of a forward pass where batch.per_device is auto."""


@dataclass(frozen=True)
class TrainWorkerConfig:
    """One training, with the results of its plan."""

    spec: FinetuneSpec
    model: Model
    fitted: Mapping[str, Any]
    """What the recipe's `fit` returned for the training set: plain values."""
    features: str
    """Folder or URL of the features, in `train/` and `eval/`."""
    claim: Claim | None = None
    """The training's lock on the output, which every checkpoint checks."""

    def to_json(self) -> str:
        """Serialises the configuration for `from_json`, including the secrets of URLs."""
        return json.dumps(
            {
                **vars(self),
                "spec": self.spec.model_dump(mode="json", context=WITH_SECRETS),
                "model": asdict(self.model),
                "features": Location(self.features).unmasked,
                "claim": self.claim and {**vars(self.claim), "out": Location(self.claim.out).unmasked},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> TrainWorkerConfig:
        """Reads a configuration that `to_json` wrote."""
        values = json.loads(text)
        spec, model = FinetuneSpec.model_validate(values.pop("spec")), Model(**values.pop("model"))
        claim = values["claim"] and Claim(**{**values["claim"], "out": Location(values["claim"]["out"])})
        return cls(spec, model, values["fitted"], Location(values["features"]), claim)

    def check(self) -> None:
        """Checks that the training still holds the output. :raises LockLostError: if it does not."""
        if self.claim is not None:
            self.claim.check(TAKEOVER_S)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, with the model's files on this machine."""
        return build_recipe(self.spec, self.model.fetch(), self.fitted)

    @property
    def state(self) -> str:
        """Folder or URL of files that are only needed during training."""
        return state_folder(self.spec)


def state_folder(spec: FinetuneSpec) -> str:
    """Returns the folder or URL of internal files in the output."""
    return join(spec.output, INNER)


def build_recipe(
    spec: FinetuneSpec,
    model: Model,
    fitted: Mapping[str, Any] | None = None,
    files: RowFiles = NO_FILES,
) -> Recipe:
    """Builds the recipe of a spec and its task.

    :param fitted: what the recipe's `fit` returned; None before the rows are validated.
    :param files: the files that rows may name.
    :raises SpecError: for a task that cannot be trained.
    """
    cls, batch = recipe_class(spec.task), spec.batch
    params = cls.Params.model_validate(spec.params)
    task_params = cls.task_params(params, batch.max_length, fitted or {})
    config = TaskConfig(model, task_params, batch.max_length, spec.seed, spec.tokenizer, files)
    task = task_class(spec.task)(config)
    return cls(task, params, spec.schedule.label_smoothing, batch, fitted)


def check_shares(size: int, per_device: int | str, least: int, most: int, group: int = 1) -> None:
    """Checks that a step can be split among each number of workers in a range. :raises SpecError: if it cannot."""
    wanted = math.lcm(*range(least, most + 1))
    if least < most and size % wanted:
        raise SpecError(
            f"batch.size {size} does not divide by each number of workers from {least} to {most}; set batch.size to a "
            f"multiple of {wanted}, or workers.at_least nearer to workers.count"
        )
    for world in range(least, most + 1):
        shares(size, per_device, world, group)


def shares(size: int, per_device: int | str, world: int, group: int = 1) -> tuple[int, int]:
    """Returns the rows of a forward pass, and the number of passes in a step (gradient accumulation).

    :param group: rows whose loss is computed together, a divisor of size: the passes of all workers together hold
        whole groups.
    :raises SpecError: if they do not divide a step.
    """
    each, rest = divmod(size, world)
    if rest:
        raise SpecError(
            f"batch.size {size} does not divide by {world} workers; set batch.size to a multiple of {world}"
        )
    fitting = [part for part in range(1, each + 1) if each % part == 0 and part * world % group == 0]
    if per_device == "auto":
        per_device = max((part for part in fitting if part <= PER_DEVICE), default=fitting[0])
    if each % int(per_device):
        raise SpecError(
            f"batch.size {size} over {world} workers is {each} rows each, which batch.per_device {per_device} does "
            f"not divide; set batch.per_device to a divisor of {each}"
        )
    if per_device not in fitting:
        raise SpecError(
            f"batch.per_device {per_device} over {world} workers is {int(per_device) * world} rows, which are not whole "
            f"groups of {group} whose loss is computed together (params.group); set batch.per_device to one of: "
            f"{', '.join(map(str, fitting))}, or a smaller params.group"
        )
    return int(per_device), each // int(per_device)
