"""Fixtures of tests of jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.jobs.endpoint import Endpoint


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr("hfbatch.engines.sending.LONGEST_PAUSE_S", 0.01)
    made = Endpoint()
    yield made
    made.stop()
