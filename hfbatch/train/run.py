"""Runs a fine-tuning: plans, connects to Ray, validates rows, writes features, trains, writes the report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from hfbatch.console.display import say as show_line
from hfbatch.console.display import screen
from hfbatch.data.filesystem import join, kind_of, list_names, open_filesystem, redact
from hfbatch.errors import SplitError
from hfbatch.output.layout import CHECKPOINTS, INNER, JOB, SUCCESS
from hfbatch.output.ledger import clear_folder
from hfbatch.output.lock import Lock, hold
from hfbatch.output.writer import write_file
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.loop.worker_config import state_folder
from hfbatch.train.plan import OURS, FinetunePlan, look_again, make_finetune_plan

MERGE_TOLERANCE = 0.01
"""Relative change of the loss by merging adapters above which the notes report it."""


@dataclass(frozen=True)
class FinetuneResult:
    """Result of a fine-tuning."""

    output: str
    model: str
    """Folder or URL of the model."""
    metrics: dict[str, Any] = field(repr=False)
    """The content of metrics.json."""
    finished: bool = False
    """Whether the training was finished before, so that nothing was left to do."""


def finetune(
    spec: FinetuneSpec,
    *,
    address: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    quiet: bool = False,
) -> FinetuneResult:
    """Trains a model, or resumes an earlier run.

    :param address: a Ray cluster; default: a running one, else a local one.
    :param overwrite: replace another training in the output.
    :param console: console for the progress; default: stderr.
    :param quiet: show no progress.
    :raises SpecError: with every fault of the spec, then with every fault of the rows; nothing is overwritten.
    :raises OutputHeldError: if another process is writing to the output.
    :raises WorkerError: if training cannot continue; the same command resumes from the newest checkpoint.
    """
    from hfbatch.train.progress import TrainProgress

    started = time.time()
    plan = make_finetune_plan(spec, overwrite)

    def say(text: str) -> None:
        if not quiet:
            show_line(console or screen(err=True), text, wrap=False)

    with hold(plan.spec.output, say) as lock:
        look_again(plan, overwrite)
        metrics = None
        if not plan.finished:
            metrics = _train(
                plan, lock, address, overwrite, TrainProgress(console, plan.title, quiet), started
            )
        lock.check()
        _tidy(plan)
        if metrics is None:
            return _finished(plan)
    return FinetuneResult(plan.spec.output, join(plan.spec.output, "model"), metrics)


def _train(
    plan: FinetunePlan, lock: Lock, address: str | None, overwrite: bool, progress: Any, started: float
) -> dict[str, Any]:
    """Trains and writes the results; returns the content of metrics.json."""
    from hfbatch.cluster.session import ceiling, connect, nodes
    from hfbatch.train.loop.worker_config import check_shares
    from hfbatch.train.worker_group import choose_worker_group, fit

    with progress:
        progress.say("connecting to Ray")
        with connect(address):
            team = choose_worker_group(plan.spec.workers, nodes(), ceiling())
            batch = plan.spec.batch
            check_shares(batch.size, batch.per_device, team.at_least, team.workers, plan.recipe.group)
            progress.say("validating the rows")
            plan, config, data = _prepare(plan, lock, overwrite, progress)
            progress.say(f"starting {team.workers} training process{'es' * (team.workers > 1)}")
            progress.measure(plan.metric, plan.spec.batch.size)
            with lock.interrupting():
                news = fit(config, team, progress.show, progress.say)
        progress.say("writing the report")
        metrics = _metrics(plan, news, data, asdict(team), time.time() - started)
        lock.check()
        _leave(plan, metrics)
    return metrics


def _finished(plan: FinetunePlan) -> FinetuneResult:
    """Returns the finished training in the output; uploads the model if requested and not done yet."""
    from hfbatch.train.hub import open_repository

    metrics = _read_metrics(plan)
    if plan.spec.push_to_hub not in (None, metrics.get("hub")):
        open_repository(plan.spec.push_to_hub)
        _leave(plan, metrics)
    return FinetuneResult(plan.spec.output, join(plan.spec.output, "model"), metrics, True)


def _leave(plan: FinetunePlan, metrics: dict[str, Any]) -> None:
    """Writes metrics, report and model card, uploads the model if requested, and marks success."""
    from hfbatch.pages.model_card import model_card
    from hfbatch.pages.training import render_report
    from hfbatch.train.hub import upload

    repo, model = plan.spec.push_to_hub, join(plan.spec.output, "model")
    name = (repo or redact(plan.spec.output)).rstrip("/").rpartition("/")[2]
    card = model_card(metrics, name, repo or redact(model), plan.recipe.auto_class)
    _write(plan, "metrics.json", metrics)
    _write_text(plan, "report.html", render_report(metrics))
    _write_text(plan, "model/README.md", card)
    if repo is not None:
        upload(model, repo)
        metrics["hub"] = repo
        _write(plan, "metrics.json", metrics)
    _write(plan, SUCCESS, {})


def _prepare(
    plan: FinetunePlan, lock: Lock, overwrite: bool, progress: Any
) -> tuple[FinetunePlan, Any, dict[str, Any]]:
    """Validates rows and writes features.

    :returns: the plan, fitted to the rows; the configuration of the training processes; `data` of metrics.json.
    :raises SpecError: for faulty rows.
    """
    from hfbatch.train.features import validate_rows, write_features
    from hfbatch.train.hub import open_repository
    from hfbatch.train.loop.worker_config import TrainWorkerConfig
    from hfbatch.train.validation import fit_plan

    found = {name: validate_rows(plan.spec, plan.model, part) for name, part in plan.parts.items()}
    plan = fit_plan(plan, found)
    if plan.spec.push_to_hub:
        open_repository(plan.spec.push_to_hub)
    lock.check()
    if overwrite:
        _clear(plan.spec.output)
    _write(plan, JOB, plan.job())
    progress.say("tokenising")
    features = join(state_folder(plan.spec), f"features-{plan.fingerprint[:12]}")
    written = {
        name: asdict(write_features(plan.spec, plan.model, plan.recipe.fitted, part, join(features, name)))
        for name, part in plan.parts.items()
    }
    config = TrainWorkerConfig(plan.spec, plan.model, plan.recipe.fitted, features, lock.claim)
    return plan, config, {"rows": written, "labels": plan.labels, "digest": plan.identity["data"]}


def _clear(output: str) -> None:
    """Deletes the files of an earlier training, but no other files, and no lock.

    Deletes the success mark first and job.json last, so that checkpoints are never taken for those of another
    training. All files under these names are the training's, since it only began if none existed.
    """
    fs, root = open_filesystem(output)
    for name in (*OURS, CHECKPOINTS):
        match kind_of(fs, f"{root}/{name}"):
            case "file":
                fs.delete_file(f"{root}/{name}")
            case "folder":
                fs.delete_dir(f"{root}/{name}")
    clear_folder(fs, f"{root}/{INNER}")


def _tidy(plan: FinetunePlan) -> None:
    """Deletes what is not needed after training: checkpoints, features, files of Ray Train."""
    fs, root = open_filesystem(state_folder(plan.spec))
    for name, folder in list_names(fs, root).items():
        if folder and (name in {"checkpoints", "ray"} or name.startswith("features-")):
            fs.delete_dir(f"{root}/{name}")


def _metrics(
    plan: FinetunePlan,
    news: dict[str, Any],
    data: dict[str, Any],
    team: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Returns the content of metrics.json."""
    from hfbatch.train.validation import label_notes

    job = plan.job()
    evaluations = [entry for entry in news["log"] if "eval_loss" in entry]
    plain = [
        {
            "step": entry["step"],
            **{name.removeprefix("eval_"): entry[name] for name in entry if name.startswith("eval_")},
        }
        for entry in evaluations
    ]
    best = next(entry for entry in plain if entry["step"] == news["best_step"])
    merged = compare(best, news["merged"]) if news["merged"] else {}
    details, lost = _with_rows(plan, news.get("details", {}))
    notes = [*plan.notes, *label_notes(data["labels"]), *merged.pop("notes", ()), *lost]
    return {
        "task": plan.spec.task,
        "method": plan.spec.method.name,
        "model": {"name": plan.model.name, "commit": plan.model.commit, "hub": plan.model.hub},
        "metric": plan.metric,
        "best": best,
        **merged,
        "notes": notes,
        "before": plain[0],
        "resumed_at": news["resumed_at"],
        "baseline": news["baseline"],
        "evaluations": plain,
        "losses": [entry for entry in news["log"] if "loss" in entry],
        "data": data,
        "trainable": news["trainable"],
        "weights": news["weights"],
        "details": details,
        "throughput": news.get("throughput", {}),
        "workers": team,
        "seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "hub": None,
        "fingerprint": plan.fingerprint,
        "hfbatch": job["hfbatch"],
        "versions": job["versions"],
        "spec": job["spec"],
    }


def _with_rows(plan: FinetunePlan, details: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Adds the file, number and contents of the rows to the details of the best evaluation.

    :returns: the details, and a note if the rows cannot be read any more, since training itself only needs features.
    """
    from hfbatch.train.features import look_up

    worst, notes = details.get("worst", []), []
    try:
        rows = look_up(plan.eval, [one["row"] for one in worst])
    except SplitError as error:
        worst, rows = [], []
        notes = [f"the rows with the highest loss are not shown: {error}"]
    named = [{**one, **row} for one, row in zip(worst, rows, strict=True)]
    return {"confusion": details.get("confusion"), "worst": named}, notes


def compare(adapted: dict[str, float], merged: dict[str, float]) -> dict[str, Any]:
    """Compares metrics before and after merging the adapters into the model.

    :returns: `merged`, the metrics; `merge`, the metric that differs most and by how much; `notes`, if the loss changed
        by more than MERGE_TOLERANCE.
    """
    differences = {name: abs(value - adapted[name]) for name, value in merged.items() if name in adapted}
    most = max(differences, key=lambda name: differences[name])
    found: dict[str, Any] = {"merged": merged, "merge": {"metric": most, "difference": differences[most]}}
    if differences["loss"] > MERGE_TOLERANCE * abs(adapted["loss"]):
        found["notes"] = [
            f"merging the adapters changed the loss from {adapted['loss']:.4g} to {merged['loss']:.4g}; `adapter` with "
            "its base is the trained model, `model` approximates it"
        ]
    return found


def _write(plan: FinetunePlan, name: str, values: Any) -> None:
    _write_text(plan, name, json.dumps(values, indent=2) if values else "")


def _write_text(plan: FinetunePlan, name: str, text: str) -> None:
    fs, path = open_filesystem(join(plan.spec.output, name))
    write_file(fs, path, text.encode("utf8", "replace"))


def _read_metrics(plan: FinetunePlan) -> dict[str, Any]:
    fs, path = open_filesystem(join(plan.spec.output, "metrics.json"))
    with fs.open_input_stream(path) as stream:
        return json.loads(stream.read())
