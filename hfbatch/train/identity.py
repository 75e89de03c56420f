"""What makes a training the one that it is, and whether an output holds it. Reads no rows."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hfbatch.data import results_version
from hfbatch.data.filesystem import join, open_filesystem
from hfbatch.data.models import Model
from hfbatch.errors import SpecError
from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.train.features import Part
from hfbatch.train.held_out import CHOICE


def training_identity(spec: FinetuneSpec, model: Model, parts: tuple[Part, Part]) -> dict[str, Any]:
    """What changes the model that comes out. The number of workers and how a step is cut do not."""
    plain = spec.model_dump(mode="json")
    for name in ("output", "workers", "report_to", "push_to_hub", "train", "eval"):
        plain.pop(name)
    plain["batch"].pop("per_device")
    if spec.workers.strategy == "fsdp":
        plain["workers"] = {"strategy": "fsdp"}  # its checkpoints are for itself alone
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
    """Whether the output holds this training, done.

    :param state: its job.json.
    :raises SpecError: if it holds another one, or one of another version of results that is not done.
    """
    old, new = _leaves(state["identity"]), _leaves(identity)
    for leaves in (old, new):
        leaves.setdefault("workers.strategy", "ddp")
        leaves.pop(results_version.KEY, None)
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    fs, root = open_filesystem(join(spec.output, "_SUCCESS"))
    done = fs.get_file_info(root).is_file
    fault = results_version.version_fault(spec.output, state)
    if differing == ["held_out"] and "held_out" not in old and (done or fault):
        differing = []  # an older version chose other rows to measure with, as the version's fault says
    if differing:
        shown = "; ".join(
            f"{name} (there: {old.get(name)!r}, now: {new.get(name)!r})" for name in sorted(differing)
        )
        raise SpecError(
            f"output {spec.output} holds another training; it differs in {shown}. Choose another "
            "output, or replace it with --overwrite"
        )
    if fault and not done:
        raise SpecError(fault)
    return done


def _leaves(values: dict[str, Any], of: str = "") -> dict[str, Any]:
    """Nested values by their full names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        found |= _leaves(value, f"{of}{name}.") if nested else {f"{of}{name}": value}
    return found
