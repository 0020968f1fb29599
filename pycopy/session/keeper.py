"""Who keeps sessions outside the engine: the port through which they go out and come back.

The engine knows neither who that is nor how (pycopy/fastpath/handover.py: the kernel).

Tests: tests/unit/test_table_kernel.py
"""

from typing import Protocol

from pycopy.session.session import Host, Session


class Keeper(Protocol):
    """Who keeps healthy sessions: the port through which they go out and come back."""

    def fetch_online(self, key: bytes, host: Host, now_ns: int) -> Session | None:
        """The session of a connection online, from now on ours; None: it has none."""

    def fetch_target(self, key: bytes, host: Host, now_ns: int) -> Session | None:
        """The session of a connection to the target, as by :meth:`fetch_online`."""

    def may_give(self, session: Session) -> bool:
        """Whether it could go on from here: nothing is out of the ordinary."""

    def give(self, session: Session) -> bool:
        """It goes on with ``session``; False if it may not, or has no room for it."""

    def claim(self, target_key: bytes, over_lingering: bool = False) -> bool:
        """We open a connection to the target; False if the keeper has that one.

        ``over_lingering``: one that is over, and only waits for what may come late, gives way.
        """

    def release(self, target_key: bytes) -> None:
        """The connection to the target is over; late segments of it are swallowed for a while."""

    def own_online(self, online_key: bytes) -> None:
        """The connection online has a session of ours."""

    def disown_online(self, online_key: bytes) -> None:
        """It has none any more."""

    def now_active(self) -> int:
        """Open sessions that it has now."""
