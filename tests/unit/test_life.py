"""The life of a run: forward only, and stopped from several sides."""

import pytest

from pycopy.process.life import NEXT, Life, Phase


def test_a_run_ends_once():
    assert set(NEXT) == set(Phase)
    life = Life()
    life.begin()
    life.stop()
    life.enter(Phase.FINISHED)
    for phase in Phase:
        with pytest.raises(AssertionError):
            life.enter(phase)
    life.stop()
    assert life.phase is Phase.FINISHED


def test_whoever_stops_a_run_that_has_not_begun_has_it_drained():
    life = Life()
    life.stop()
    life.begin()
    life.stop()
    assert life.phase is Phase.DRAINING


def test_a_run_that_fails_is_not_drained():
    life = Life()
    life.begin()
    life.enter(Phase.FINISHED)
