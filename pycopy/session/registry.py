"""What the opening of sessions needs of the table that they are entered in.

Tests: tests/unit/test_opening.py
"""

from typing import Protocol

from pycopy.session.fates import Fate
from pycopy.session.keeper import Keeper
from pycopy.session.session import Host, Session


class Registry(Host, Protocol):
    """A host that knows its sessions by both of their keys."""

    by_online: dict[bytes, Session]
    by_target: dict[bytes, Session]
    keeper: Keeper | None
    #: Why no session may be opened now; None: they may.
    refusing: Fate | None

    def disown(self, key: bytes) -> None:
        """The connection ``key`` has no session here: the kernel may open its next one."""

    def release(self, target_key: bytes) -> None:
        """No session has this connection to the target any more."""
