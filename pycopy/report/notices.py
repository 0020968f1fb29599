"""What a run says of itself while it goes on, besides its numbers: once, when it matters.

Tests: tests/lab/test_replay_words.py
"""

from pycopy.kernel.abi import CaptureCount
from pycopy.process.console import say
from pycopy.report.ledger import Ledger
from pycopy.session.fates import Count
from pycopy.session.rules import SECOND

#: SYNs without any response for so long are worth a word.
SILENCE_NS = 3 * SECOND


class Silence:
    """Nothing at all comes back: the commonest fault, and the ledger balances all the same."""

    def __init__(self, ledger: Ledger, targets: str, hints: str) -> None:
        """``hints``: what to look at then."""
        self._ledger = ledger
        self._targets = targets
        self._hints = hints
        self._first_syn_ns = 0
        #: Nothing has come back so far, and nothing was said about it.
        self.lasts = True

    def look(self, now_ns: int) -> None:
        """Say so if it has lasted for too long; the ledger is up to date."""
        counts = self._ledger.counts
        if counts[Count.RESPONSES]:
            self.lasts = False
        elif not counts[Count.SENT_SYN]:
            self._first_syn_ns = now_ns
        elif now_ns - self._first_syn_ns >= SILENCE_NS:
            self.lasts = False
            say(f"no answer yet from {self._targets} to {counts[Count.SENT_SYN]} SYNs")
            say(f"  {self._hints}")


class Lapses:
    """This process stood still for so long that the programs stopped copying."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        #: Segments not copied in those that have been told of.
        self._told = 0

    def tell(self, missed_ns: int) -> None:
        """One has lasted for ``missed_ns``; the ledger is up to date."""
        lapsed = self._ledger.kernel_capture[CaptureCount.LAPSED]
        say(
            f"this process stood still for {missed_ns / SECOND:.1f} s (stopped, or without a"
            f" CPU): {lapsed - self._told} segments were not copied meanwhile; going on"
        )
        self._told = lapsed
