"""Loading a model leaves the process as it was."""

from __future__ import annotations

import gc

import pytest

from hfbatch.runtime.machine import collector_at_rest


@collector_at_rest()
def load(broken: bool) -> bool:
    """:returns: whether the collector is on."""
    if broken:
        raise ValueError("broken model")
    return gc.isenabled()


def test_the_collector_rests_and_works_again_whatever_happens() -> None:
    with collector_at_rest():
        assert not load(broken=False)
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="broken model"):
        load(broken=True)
    assert gc.isenabled()


def test_a_collector_that_its_owner_has_switched_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
