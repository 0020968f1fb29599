"""The replay driver before it needs any privilege. What it does: tests/lab."""

import signal

import pytest

from pycopy.command.config import ReplayConfig
from pycopy.process.loop import Loop
from pycopy.replay import Replay
from pycopy.report.ledger import Ledger
from pycopy.report.reporter import Console
from pycopy.sources.live import Captures


def test_one_closer_that_fails_does_not_skip_the_rest():
    before = signal.getsignal(signal.SIGTERM)
    ledger = Ledger()
    replay = Replay(ReplayConfig(), ledger, Console(ledger, 1.0, True, False, "test"))
    closed = []

    class Broken:
        class ring:
            @staticmethod
            def fileno():
                return -1

        def close(self):
            closed.append(self)
            raise OSError("it does not close")

    replay._attached.callback(Captures([Broken(), Broken()], Loop(), print, 0).close)
    with pytest.raises(OSError, match="does not close"):
        replay.close()
    assert len(closed) == 2
    assert signal.getsignal(signal.SIGTERM) == before
    assert replay._loop._epoll.closed
