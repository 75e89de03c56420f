"""The `serve` section of a spec: where and how an endpoint answers requests."""

from __future__ import annotations

import ipaddress
from typing import Literal, Self

from pydantic import Field, model_validator

from hfbatch.spec.section import Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class AutoscaleSpec(Section):
    """Replicas that are started and ended by the number of requests."""

    min: int = Field(default=1, ge=1)
    """Replicas that always run."""
    max: int = Field(ge=1)
    """Replicas at most."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}; set a larger max")
        return self


class LimitsSpec(Section):
    """What one client may ask for."""

    body_bytes: int = Field(default=8 << 20, ge=1)
    """Maximum number of bytes in the body of a request; larger ones get 413."""
    rows: int = Field(default=256, ge=1)
    """Maximum number of rows in a request."""
    new_tokens: int = Field(default=1024, ge=1)
    """Maximum number of tokens that a request may have generated for a row."""
    texts: int = Field(default=8, ge=1)
    """Maximum number of texts that a request may have generated for a row."""
    ongoing: int = Field(default=256, ge=1)
    """Requests that a replica works on, those that wait for a batch included."""
    queued: int = Field(default=1024, ge=1)
    """Requests that wait for a replica; further ones get 429 with Retry-After."""
    seconds: float = Field(default=120, gt=0)
    """Maximum time of a request; later answers become 408."""


class EndpointSpec(Section):
    """Where and how requests are answered."""

    name: str = Field(default="", pattern=f"^$|{NAME}")
    """Name of the endpoint, and of the model for OpenAI clients; default: the last part of the model's name."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on; others than this machine's own need token_env."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    token_env: str | None = Field(default=None, min_length=1)
    """Environment variable with the bearer token that requests have to carry."""
    proxy: Literal["python", "haproxy"] = "python"
    """What listens on the port: Ray Serve's own proxy, or HAProxy, which takes less time for each request, and opens more ports. It
    needs a cluster that the command starts."""
    wait_ms: float = Field(default=0, ge=0, le=10_000)
    """How long a request waits for others while the model is free, in milliseconds; while it is busy, they collect anyway."""
    rows: int = Field(default=64, ge=1)
    """Rows that are collected at most; the model runs them by length in batches of batch.size and batch.tokens."""
    autoscale: AutoscaleSpec | None = None
    """Number of replicas by load; null: workers.count replicas, 1 where that is auto."""
    limits: LimitsSpec = LimitsSpec()
    """What one client may ask for."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def host_in_url(self) -> str:
        """The host as URLs have it: IPv6 addresses in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host
