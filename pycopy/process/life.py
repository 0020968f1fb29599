"""Where a run is in its life: one table for replay, intercept, and the master of workers.

Tests: tests/unit/test_replay.py, tests/unit/test_intercept.py
"""

from enum import Enum


class Phase(Enum):
    """See :data:`NEXT`."""

    STARTING = "nothing is captured or swallowed yet"
    RUNNING = "at work"
    DRAINING = "told to stop: nothing new is begun, what is under way still ends"
    FINISHED = "nothing is counted any more, the ledger is final"


#: What each phase may be followed by. A run that fails is not drained.
NEXT = {
    Phase.STARTING: {Phase.RUNNING, Phase.DRAINING},
    Phase.RUNNING: {Phase.DRAINING, Phase.FINISHED},
    Phase.DRAINING: {Phase.FINISHED},
    Phase.FINISHED: set(),
}


class Life:
    """One run's."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING

    def enter(self, phase: Phase) -> None:
        """Go to ``phase``, which the table must have after the one that is."""
        assert phase in NEXT[self.phase], f"{phase.name} after {self.phase.name}"
        self.phase = phase

    def begin(self) -> None:
        """Everything is ready; whoever stopped the run before has it drained at once."""
        if self.phase is Phase.STARTING:
            self.enter(Phase.RUNNING)

    def stop(self) -> None:
        """Drain, whoever says so and however often."""
        if Phase.DRAINING in NEXT[self.phase]:
            self.enter(Phase.DRAINING)
