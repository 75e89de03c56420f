"""`hfbatch run-batch`: a batch file of the OpenAI API, answered by an endpoint that runs for it, or by another one."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfbatch.cli.options import Address, Json, Overwrite, Params, Quiet, Sets, serve_specs
from hfbatch.cli.terminal import answer, faults_shown
from hfbatch.console.display import say, screen
from hfbatch.console.progress import SECONDS_BETWEEN_LINES

if TYPE_CHECKING:
    from hfbatch.serve.batch_file import Answers, BatchFile
    from hfbatch.serve.plan import ServePlan

MANY = 1_000_000
"""Limits of an endpoint that has one client."""


def run_batch(
    source: Annotated[Path, typer.Option("--input", "-i", help="Batch file: one request in each line.")],
    target: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; a rerun answers what is left.")
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub name or folder.")] = None,
    url: Annotated[
        str | None, typer.Option(help="An endpoint that runs, without /v1, in place of a model.")
    ] = None,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token of the endpoint.")
    ] = None,
    concurrent: Annotated[int, typer.Option(min=1, help="Maximum of requests that are under way.")] = 64,
    param: Params = None,
    set_: Sets = None,
    address: Address = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer a batch file of the OpenAI API, each request exactly once; a rerun resumes it.

    Example: hfbatch run-batch -i requests.jsonl -o answers.jsonl --model org/model
    """
    with faults_shown(as_json, resumes=True):
        from hfbatch.errors import SpecError
        from hfbatch.serve.batch_file import Answers, open_batch

        if (model is None) == (url is None):
            raise SpecError("name the model with --model, or an endpoint that runs with --url")
        if url:
            _check_flags(url, token_env, {"--param": param, "--set": set_, "--address": address})
        batch = open_batch(source)
        plan = None if model is None else _plan(batch, model, param, set_)
        by: dict[str, Any] = {"url": url}
        if plan:
            commit = plan.model.commit
            by = {"model": model, "commit": commit, "params": sorted(param or []), "set": sorted(set_ or [])}
            token_env = plan.spec.serve.token_env
        with Answers(target, batch, by).open(overwrite) as answers:
            _answer(batch, answers, plan, url, address, concurrent, token_env, quiet)
            counts = answers.finish()
        values = {"requests": len(batch.ids), **counts, "output": str(target)}
        shown = f"{counts['answered']:,} answers and {counts['failed']:,} errors in {target}"
        answer(values, as_json, lambda console: say(console, shown))
        if counts["failed"]:
            raise typer.Exit(3)


def _check_flags(url: str, token_env: str | None, others: dict[str, Any]) -> None:
    """Checks what belongs to an endpoint that runs. :raises SpecError: with every fault."""
    from hfbatch.errors import SpecError

    faults = [f"{name} has no effect with --url; leave it out" for name, value in others.items() if value]
    if not url.startswith(("http://", "https://")):
        faults.append(f"--url {url!r} has to begin with http:// or https://")
    if token_env and not os.environ.get(token_env):
        faults.append(f"--token-env: the environment variable {token_env} is not set")
    if faults:
        raise SpecError(faults)


def _plan(batch: BatchFile, model: str, param: list[str] | None, set_: list[str] | None) -> ServePlan:
    """The plan of an endpoint for the requests alone, without limits. :raises SpecError: with every fault."""
    from hfbatch.engines.sending import free_port
    from hfbatch.errors import SpecError
    from hfbatch.serve.batch_file import MOST_BYTES, TASKS
    from hfbatch.serve.plan import make_plan
    from hfbatch.spec.serve import NAME

    tasks = sorted({TASKS[url] for url in batch.urls})
    if len(tasks) > 1:
        raise SpecError(f"the requests are for tasks {' and '.join(tasks)}; write one file for each")
    limits = dict.fromkeys(("new_tokens", "texts", "rows", "queued", "seconds"), MANY) | {
        "body_bytes": MOST_BYTES
    }
    flags = [f"serve.limits.{name}={value}" for name, value in limits.items()]
    plan = make_plan(serve_specs(tasks, model, None, free_port(), param, [*flags, *(set_ or [])])[0])
    known = (None, plan.spec.serve.name, model)
    others = sorted({str(name) for line in batch.lines() if (name := line.body.get("model")) not in known})
    if others:
        usable = re.fullmatch(NAME, others[0])
        fix = (
            f"use --set serve.name={others[0]} to answer them with it"
            if usable
            else "leave `model` out of them"
        )
        raise SpecError(
            f"requests name the model {others[0]!r}, and this one is {plan.spec.serve.name!r}; {fix}"
        )
    return plan


def _answer(
    batch: BatchFile,
    answers: Answers,
    plan: ServePlan | None,
    url: str | None,
    address: str | None,
    concurrent: int,
    token_env: str | None,
    quiet: bool,
) -> None:
    """Has the requests that have no answer answered: by the endpoint at a URL, or by one of the plan."""
    import asyncio  # here, since it would be a tenth of the time of every `hfbatch --help`

    from hfbatch.serve.batch_run import send_batch

    console, left = screen(err=True), len(batch.ids) - len(answers.done)
    count = Count(left, lambda text: None if quiet else say(console, text))
    token = os.environ.get(token_env or "")
    if plan is None and url:
        base = url.rstrip("/").removesuffix("/v1")
        asyncio.run(send_batch(batch, answers, base, concurrent, token, on_answer=count.add))
    elif plan and left:
        from hfbatch.serve.run import serving

        with serving([plan], address) as (own,):
            asyncio.run(send_batch(batch, answers, own, concurrent, token, seconds=MANY, on_answer=count.add))


class Count:
    """Reports every few seconds how many requests are answered.

    :param left: requests to answer.
    :param report: takes a line.
    """

    def __init__(self, left: int, report: Callable[[str], None]) -> None:
        self._left, self._report, self._done, self._failed = left, report, 0, 0
        self._begun = self._shown = time.monotonic()
        report(f"{left:,} requests to answer")

    def add(self, status: int) -> None:
        """Counts an answer. :param status: of HTTP."""
        self._done, self._failed, now = self._done + 1, self._failed + (status != 200), time.monotonic()
        if now - self._shown > SECONDS_BETWEEN_LINES or self._done == self._left:
            self._shown, rate = now, self._done / max(now - self._begun, 1e-9)
            self._report(f"{self._done:,}/{self._left:,} requests · {rate:,.1f}/s · {self._failed:,} errors")
