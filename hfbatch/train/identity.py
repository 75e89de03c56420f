"""The identity of a training, and whether an output holds that training. Reads no rows."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hfbatch.data.filesystem import join, open_filesystem
from hfbatch.errors import SpecError
from hfbatch.hub.models import Model
from hfbatch.output import results_version
from hfbatch.output.identity import differences
from hfbatch.output.layout import SUCCESS
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.data.held_out import CHOICE
from hfbatch.train.features import Part


def training_identity(spec: FinetuneSpec, model: Model, parts: tuple[Part, Part]) -> dict[str, Any]:
    """Returns everything that changes the trained model: not the number of workers, nor how a step is split."""
    plain = spec.model_dump(mode="json")
    for name in ("output", "workers", "report_to", "push_to_hub", "train", "eval"):
        plain.pop(name)
    plain["batch"].pop("per_device")
    if spec.workers.strategy == "fsdp":
        plain["workers"] = {"strategy": "fsdp"}  # its checkpoints cannot be used with ddp
    plain["model"] = {**plain["model"], "name": None, "revision": None, "commit": model.commit}
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        splits, read = [split.to_dict() for split in part.splits], part.read
        types = {name: str(read.schema.field(name).type) for name in sorted(read.given)}
        taken = [splits, dict(part.columns), read.filter, part.share, part.aside, *([types] if types else [])]
        digest.update(json.dumps(taken).encode())
    held_out = {"held_out": CHOICE} if spec.eval is None else {}
    versioned = {results_version.KEY: results_version.RESULTS_VERSION}
    return {**plain, **held_out, **versioned, "data": digest.hexdigest()}


def is_finished(state: dict[str, Any], spec: FinetuneSpec, identity: dict[str, Any]) -> bool:
    """Returns whether the output holds this training, finished.

    :param state: job.json of the output.
    :raises SpecError: if it holds another training, or an unfinished one of another version of results.
    """
    plain = {"workers": {"strategy": "ddp"}}
    differing = differences({**plain, **state["identity"]}, {**plain, **identity})
    fs, root = open_filesystem(join(spec.output, SUCCESS))
    done = fs.get_file_info(root).is_file
    fault = results_version.version_fault(spec.output, state)
    if differing.keys() == {"held_out"} and "held_out" not in state["identity"] and (done or fault):
        differing = {}  # an older version held out other rows, as the version's fault says
    if differing:
        shown = "; ".join(differing[name] for name in sorted(differing))
        raise SpecError(
            f"output {spec.output} holds another training; it differs in {shown}. Choose another "
            "output, or replace it with --overwrite"
        )
    if fault and not done:
        raise SpecError(fault)
    return done
