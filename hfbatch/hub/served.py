"""Models that an endpoint serves: of those, nothing is known but the name, and whether the endpoint lists it."""

from __future__ import annotations

import asyncio
import os
from difflib import get_close_matches

from hfbatch.errors import SpecError, one_line
from hfbatch.hub.models import Model
from hfbatch.spec.engines import HttpEngineSpec
from hfbatch.spec.job import ModelSpec

TIMEOUT_S = 30.0
MOST_SHOWN = 5
REFUSED = (401, 403)


def read_token(engine: HttpEngineSpec) -> str | None:
    """Returns the bearer token from the environment, without spaces around it; None if the spec names no variable.

    :raises ValueError: if the variable is not set, or holds what no header can.
    """
    if engine.token_env is None:
        return None
    token = os.environ.get(engine.token_env, "").strip()
    if not token or not token.isprintable():
        fault = "holds a line break or another control character" if token else "is not set"
        raise ValueError(f"the environment variable {engine.token_env} {fault}")
    return token


def token_hint(engine: HttpEngineSpec) -> str:
    """Returns what to do about an endpoint that refuses the token, or asks for one."""
    name = engine.token_env
    return f"check the token in {name}" if name else "name the variable with its token in engine.token_env"


def served_model(spec: ModelSpec, engine: HttpEngineSpec, notes: list[str]) -> Model:
    """Asks the endpoint for its models; returns the one of the spec, without files and without a commit.

    :raises SpecError: if the endpoint cannot be reached, refuses the token or does not list the model, and for settings that
        only a model on this side has.
    """
    defaults = ModelSpec(name=spec.name)
    faults = [
        f"model.{name}: the endpoint loads the model; leave it out"
        for name in ("file", "revision", "dtype", "trust_remote_code")
        if getattr(spec, name) != getattr(defaults, name)
    ]
    token = None
    try:
        token = read_token(engine)
    except ValueError as error:
        faults.append(f"engine.token_env: {error}; set it to the token")
    if faults:
        raise SpecError(faults)
    known = asyncio.run(_listed(engine, token, notes))
    if known is not None and spec.name not in known:
        alike = get_close_matches(spec.name, known, MOST_SHOWN, 0) or known[:MOST_SHOWN]
        shown = ", ".join(map(repr, alike)) or "none"
        raise SpecError(
            f"model.name: the endpoint at {engine.url} does not list {spec.name!r}; it lists {shown}"
        )
    notes.append(
        "an endpoint may answer the same request differently, and change its model: a rerun keeps what is committed, and "
        "cannot compute the same again"
    )
    return Model(spec.name, "", spec.name)


async def _listed(engine: HttpEngineSpec, token: str | None, notes: list[str]) -> list[str] | None:
    """Returns the names of the models that the endpoint lists; None if it lists none."""
    import aiohttp

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), headers=headers) as session,
            session.get(f"{engine.url}/v1/models", allow_redirects=False) as response,
        ):
            if response.status in REFUSED:
                raise SpecError(
                    f"engine.url: the endpoint at {engine.url} answers {response.status}; {token_hint(engine)}"
                )
            if 300 <= response.status < 400:
                to = response.headers.get("Location", "another place")
                raise SpecError(
                    f"engine.url: {engine.url} redirects requests to {to}; give the URL that answers them"
                )
            body = await response.json(content_type=None) if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise SpecError(
            f"engine.url: no endpoint answers at {engine.url}: {one_line(error)}; start it, or correct the URL"
        ) from error
    except (ValueError, LookupError, RecursionError):  # no JSON, or in an encoding that does not exist
        body = None
    data = body.get("data") if isinstance(body, dict) else None
    if not isinstance(data, list):
        notes.append(f"the endpoint at {engine.url} does not list its models, so model.name is not checked")
        return None
    return [str(one["id"]) for one in data if isinstance(one, dict) and "id" in one]
