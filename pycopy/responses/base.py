"""Where the target's answers come from, by placement; the session engine does not know.

:class:`~pycopy.responses.here.OwnAnswers` swallows them on this host (zero-route mode); where
they come from ``pycopy intercept`` on other hosts, elsewhere.py has them. Both choose the addresses
copies leave from, take claims from the session table, and hand every answer to the driver.

Tests: tests/unit/test_elsewhere.py
"""

from typing import Protocol

from pycopy.fastpath.driver import FastPath
from pycopy.session.addresses import Addresses
from pycopy.session.table import Table
from pycopy.tap import Tap, Transport

Targets = list[tuple[bytes, int]]


class Answers(Protocol):
    """What the driver asks of either. ``start`` may raise PycopyError; ``close`` undoes it all."""

    #: Local programs and their rings; empty if there are none here.
    taps: list[Tap]
    #: Answers could reach real clients now: nothing may be sent.
    cut_off: bool
    #: What to look at when no answer comes at all.
    hints: str

    @property
    def deadline_ns(self) -> int:
        """When :meth:`on_timer` has something to do."""

    @property
    def dropped(self) -> int:
        """Answers that were lost on their way to us, as far as it is known."""

    def addresses(self) -> Addresses: ...

    def may_stay_in_kernel(self) -> str:
        """Why the kernel cannot keep sessions here; empty: it can."""

    def start(self, table: Table, fastpath: FastPath | None, transport: Transport) -> None: ...

    def catch_up(self) -> None:
        """Everything is loaded, which may have taken its time: be ready when this returns."""

    def describe(self) -> str: ...

    def flush(self) -> None: ...

    def on_timer(self, now_ns: int) -> None: ...

    def on_hop_change(self) -> None: ...

    def forget_released(self) -> None:
        """Once a second."""

    def watch(self) -> None:
        """Devices have come or gone."""

    def close(self) -> None: ...
