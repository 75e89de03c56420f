"""A slow split is a slow split; a worker that is dead, stopped or stuck ends the job with a sentence. Without Ray."""

from __future__ import annotations

import time

import pytest

from hfbatch.cluster import pipeline, tracker
from hfbatch.cluster.pipeline import _silence
from hfbatch.cluster.tracker import LOAD, Activity, TrackerState
from hfbatch.console.progress import Rates, Snapshot, status_line
from hfbatch.runtime.heartbeat import beating


def test_work_that_takes_long_sends_heartbeats_until_it_ends() -> None:
    beats: list[float] = []
    with beating(lambda: beats.append(time.monotonic()), seconds=0.01):
        deadline = time.monotonic() + 30
        while len(beats) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(beats) >= 3
    time.sleep(0.05)
    after = len(beats)
    time.sleep(0.1)
    assert len(beats) == after


def test_a_slow_split_is_reported_and_does_not_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    state = TrackerState(None)
    state.loaded()
    state.attempt("preprocess", "part-0", 256)
    for _ in range(256):  # rows of seven seconds each
        now[0] += 7
        state.beat("preprocess", "part-0")
        assert _silence(state.activity(), 1_000_000.0) == []
    found = state.activity()
    assert (found.reading, now[0] - found.oldest, found.oldest_part) == (256, 1792.0, "part-0")
    shown = Snapshot(
        state="choosing precision and batch size", reading=found.reading, oldest=now[0] - found.oldest
    )
    assert status_line(shown, Rates()).endswith("256 rows being read · slowest split 29:52")

    now[0] += pipeline.SILENCE_TIMEOUT_S + 1  # its process is dead, or stopped
    assert "heartbeat" in _silence(state.activity(), 1_000_000.0)[0]
    assert state.activity().reading == 0


def test_workers_that_live_and_get_no_further_end_the_job_after_a_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.time()
    stuck = Activity(workers=1, last_progress=now - pipeline.STUCK_TIMEOUT_S - 1, oldest_part="part-7")
    assert "the oldest on split part-7" in _silence(stuck, now)[0]


def test_a_model_that_loads_slowly_is_waited_for_and_one_that_dies_again_and_again_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    state = TrackerState(None)
    state.attempt(LOAD, "worker-0")
    for _ in range(200):
        now[0] += 10
        state.beat(LOAD, "worker-0")
    assert _silence(state.activity(), 1_000_000.0) == []
    for process in range(1, 9):  # it dies, and others do while they load
        now[0] += tracker.ALIVE_S + 1
        state.attempt(LOAD, f"worker-{process}")
    assert "no model worker has started" in _silence(state.activity(), 1_000_000.0)[0]
