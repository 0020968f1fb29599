"""The replay driver before it needs any privilege. What it does: tests/lab."""

import signal

import pytest

from pycopy.command.config import ReplayConfig
from pycopy.replay import Replay


def test_one_closer_that_fails_does_not_skip_the_rest(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    replay = Replay(ReplayConfig())
    closed = []

    class Broken:
        class ring:
            @staticmethod
            def fileno():
                return -1

        def close(self):
            closed.append(self)
            raise OSError("it does not close")

    replay._captures = [Broken(), Broken()]
    with pytest.raises(OSError, match="does not close"):
        replay.close()
    assert len(closed) == 2
    assert signal.getsignal(signal.SIGTERM) == before
    assert replay._loop._epoll.closed
