"""The end of what goes on by itself: turn after turn, until nothing more happens."""

import time
from collections.abc import Callable


def until_quiet(
    is_busy: Callable[[], bool], turn: Callable[[int], None], limit_ns: int, settle_ns: int
) -> None:
    """Call ``turn`` with the time until which it may wait, until ``is_busy`` has been false for
    ``settle_ns``, but for no longer than ``limit_ns``."""
    now_ns = time.monotonic_ns()
    until_ns, settled_ns = now_ns + limit_ns, now_ns + settle_ns
    while now_ns < until_ns:
        if is_busy():
            settled_ns = now_ns + settle_ns
        elif now_ns >= settled_ns:
            return
        turn(now_ns + settle_ns // 4)
        now_ns = time.monotonic_ns()
