"""Plans an endpoint from its spec, and reports all faults together. Starts nothing. Does not import Ray."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

from hfbatch.engines import kind_of
from hfbatch.errors import SpecError
from hfbatch.hub.models import Model, pin
from hfbatch.predict.bind import gather
from hfbatch.predict.prompts import rendered_input
from hfbatch.runtime.checks import check_task, name_task, packing_faults, readable
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.variants import is_quantised
from hfbatch.serve.haproxy import HOSTS, missing
from hfbatch.spec.engines import EngineSpec, TorchEngineSpec
from hfbatch.spec.job import ServeSpec
from hfbatch.spec.serve import EndpointSpec
from hfbatch.tasks.base import Task

SHORTEST_TOKEN = 16
"""Characters of a token that cannot be guessed."""


@dataclass(frozen=True)
class EndpointConfig:
    """What a replica needs: plain values that travel between processes."""

    runner: RunnerConfig
    endpoint: EndpointSpec
    token: str | None = None
    """SHA-256 of the bearer token, in hexadecimal; None if requests need none."""
    packs: bool = False
    """Whether batches are packed on CPUs, where the spec leaves it open."""

    def to_json(self) -> str:
        """The settings as text."""
        endpoint = self.endpoint.model_dump(mode="json")
        return json.dumps(
            {"runner": self.runner.to_json(), "endpoint": endpoint, "token": self.token, "packs": self.packs}
        )

    @classmethod
    def from_json(cls, text: str) -> EndpointConfig:
        """The reverse of to_json."""
        values = json.loads(text)
        endpoint = EndpointSpec.model_validate(values["endpoint"])
        return cls(RunnerConfig.from_json(values["runner"]), endpoint, values["token"], values["packs"])


@dataclass
class ServePlan:
    """An endpoint whose spec, model and task go together."""

    spec: ServeSpec
    """With the task's own name and the endpoint's name."""
    model: Model
    task: Task
    config: EndpointConfig
    notes: list[str]

    def to_values(self) -> dict[str, Any]:
        """The plan as plain values."""
        where = self.spec.serve
        return {
            "name": where.name,
            "url": url_of(where),
            "task": self.spec.task,
            "model": {"name": self.model.name, "commit": self.model.commit},
            "engine": self.spec.engine.name,
            "packing": "on CPUs"
            if self.config.packs
            else getattr(self.spec.engine, "packing", False) is True,
            "notes": self.notes,
        }


def url_of(endpoint: EndpointSpec) -> str:
    """The URL of an endpoint's address."""
    return f"http://{endpoint.host_in_url}:{endpoint.port}"


def make_plan(spec: ServeSpec) -> ServePlan:
    """Checks the spec and the model. :raises SpecError: with every fault found."""
    faults: list[str] = []
    notes: list[str] = []
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        faults.append("serving needs FastAPI and uvicorn; pip install 'hfbatch[serve]'")
    if spec.serve.proxy == "haproxy":
        faults += _haproxy_faults(spec.serve)
    token = _token(spec.serve, faults)
    faults += _engine_faults(spec)
    model = task = None
    with gather(faults):
        model = readable(pin(spec.model, graphs=True, adapters=kind_of(spec.engine.name).adapters))
    with gather(faults):
        spec = cast(ServeSpec, name_task(spec, model, notes))
        task = check_task(spec, model, "", faults, notes)
    if task is not None:
        rendered_input(task, faults)
        if task.fits:
            faults.append(
                f"task {task.name} takes values from the rows of a job, which an endpoint does not have; give those that "
                "job.json of such a job holds as `fitted`, in params"
            )
    if faults or model is None or task is None:
        raise SpecError(list(dict.fromkeys(faults)))
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.model.name.rstrip("/").rpartition("/")[2]).strip("-._")
    named = spec.serve.model_copy(update={"name": spec.serve.name or last or spec.task})
    spec = spec.model_copy(update={"serve": named})
    config = EndpointConfig(RunnerConfig.of(spec, model), named, token, _packs(spec.engine, task))
    return ServePlan(spec, model, task, config, notes + task.notes())


def _haproxy_faults(endpoint: EndpointSpec) -> list[str]:
    """Returns errors if HAProxy is not there, or could not reach the replicas."""
    faults = []
    if missing():
        faults.append(
            "serve.proxy haproxy: there is no HAProxy on this machine; pip install 'hfbatch[serve]' on Linux, put the program "
            "haproxy on the PATH, or leave serve.proxy out"
        )
    if endpoint.host not in HOSTS:
        faults.append(
            f"serve.proxy haproxy does not reach replicas at serve.host {endpoint.host}; set serve.host to {' or '.join(HOSTS)}, or "
            "leave serve.proxy out"
        )
    return faults


def _packs(engine: EngineSpec, task: Task) -> bool:
    """Returns whether batches can be packed, and the spec leaves it open. Requests differ in length more than the rows of a split."""
    if not isinstance(engine, TorchEngineSpec) or engine.packing != "auto":
        return False
    plain = engine.compile is not True and engine.device_map is None and engine.quantization == "none"
    return plain and not task.model.graphs and not is_quantised(task) and not packing_faults(task)


def _token(endpoint: EndpointSpec, faults: list[str]) -> str | None:
    """Returns the digest of the token in the environment; adds a fault where there has to be one."""
    if endpoint.token_env is None:
        if not endpoint.loopback:
            faults.append(
                f"serve.host {endpoint.host} can be reached from other machines; set serve.token_env to the name of an "
                "environment variable with a bearer token, or serve.host to 127.0.0.1"
            )
        return None
    token = os.environ.get(endpoint.token_env, "")
    if len(token) < SHORTEST_TOKEN:
        faults.append(
            f"serve.token_env: the environment variable {endpoint.token_env} "
            f"{'is not set' if not token else f'has {len(token)} characters'}; set it to a random text of at least "
            f"{SHORTEST_TOKEN} characters, such as the output of `openssl rand -hex 16`"
        )
    return hashlib.sha256(token.encode()).hexdigest()


def _engine_faults(spec: ServeSpec) -> list[str]:
    """Returns errors for what is decided by the rows of a job, which an endpoint does not have."""
    faults = []
    if spec.engine.name == "http":
        faults.append(
            "engine http sends the rows of jobs to an endpoint; clients can ask that endpoint itself"
        )
    if spec.engine.name == "auto":
        faults.append(
            "engine auto compares engines on the rows of a job; name the engine of an endpoint: "
            "`hfbatch plan` of a job prints the fastest one"
        )
    if spec.engine.guard.mode == "required":
        faults.append(
            "engine.guard required compares precisions on the rows of a job, which an endpoint does not have; run "
            "`hfbatch preview` on your rows, and leave the guard out of the endpoint's spec"
        )
    if spec.output.truncated:
        faults.append("output.truncated adds a column to a job's output; leave it out of an endpoint's spec")
    return faults
