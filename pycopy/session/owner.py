"""Whoever swallows responses for a table's sessions, as the table knows it.

The engine knows neither who that is nor how (pycopy/responses/: programs on this host, or
intercepts on others).

Tests: tests/unit/test_table.py
"""

from typing import Protocol


class Owner(Protocol):
    """Whoever swallows responses: it must know which connections to the target are copies."""

    def claim(self, target_key: bytes) -> None:
        """A session has this connection (KEY) from now on; said before its SYN leaves."""

    def give(self, target_key: bytes) -> None:
        """The keeper goes on with it."""

    def release(self, target_key: bytes) -> None:
        """It is over."""


class Nobody:
    """An owner where nothing needs to be told."""

    def claim(self, target_key: bytes) -> None:
        """Nothing is swallowed by connection."""

    def give(self, target_key: bytes) -> None:
        """It does not matter who has the session."""

    def release(self, target_key: bytes) -> None:
        """Nothing was claimed."""
