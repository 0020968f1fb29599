"""Whom a replay gives account to while it runs: the user's console, or a master of workers.

Tests: tests/unit/test_replay.py
"""

from collections.abc import Callable
from typing import Protocol

from pycopy.process.loop import Loop
from pycopy.report.ledger import Ledger
from pycopy.report.view import View


class Reporter(Protocol):
    """What a run asks of it. The ledger is up to date whenever it is called."""

    #: Somebody looks at the ledger all the time: it is kept up to date.
    watches: bool
    #: A second INT or TERM ends the run at once.
    second_ends: bool

    def join(self, loop: Loop, stop: Callable[[], None]) -> None:
        """The run is made: watch for whoever may end it besides signals."""

    def on_second(self) -> None:
        """Once a second."""

    def show(self) -> None:
        """The user wants to see the ledger (SIGUSR1)."""


class Console:
    """The reporter of a run that stands alone."""

    second_ends = True

    def __init__(
        self, ledger: Ledger, interval_s: float, quiet: bool, json: bool, title: str
    ) -> None:
        self.watches = not quiet
        self.view = View(ledger.snapshot, interval_s, quiet, json, title)

    def join(self, loop: Loop, stop: Callable[[], None]) -> None:
        """Nobody but signals ends it."""

    def on_second(self) -> None:
        """The view has a clock of its own."""

    def show(self) -> None:
        """Print the ledger."""
        self.view.summary()
