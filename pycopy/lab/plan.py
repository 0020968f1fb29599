"""Which request goes over which connection, and when it is due.

Pure arithmetic: no clock, no socket.

Tests: tests/unit/test_lab.py
"""

from collections import deque


class Plan:
    """The requests of one connection: numbers, and when each is due (0: at once)."""

    __slots__ = ("close", "dues", "number", "requests")

    def __init__(self, number: int, close: str) -> None:
        self.number = number
        self.close = close
        self.requests: list[int] = []
        self.dues: list[float] = []


def make_plans(
    requests: int, connections: int, short: int, concurrency: int, close: str, rate: float
) -> list[Plan]:
    """Spread requests over connections, ``short`` of which carry one request only.

    At a constant rate the requests go round among ``concurrency`` connections; a connection
    that has carried its share makes room for the next one. ValueError: the numbers contradict
    each other.
    """
    if not 0 <= short <= connections <= requests or (short == connections != requests):
        raise ValueError(f"{requests} requests over {connections} connections, {short} short")
    whole, rest = divmod(requests - short, (connections - short) or 1)
    shares, long_ones = [], 0
    for number in range(connections):
        if (number + 1) * short // connections > number * short // connections:
            shares.append(1)
        else:
            shares.append(whole + (long_ones < rest))
            long_ones += 1
    kinds = ("server", "client") if close == "mix" else (close,)
    plans = [Plan(number, kinds[number % len(kinds)]) for number in range(connections)]
    waiting = deque(zip(plans, shares, strict=True))
    active: deque[tuple[Plan, int]] = deque()
    number = 0
    while waiting or active:
        while waiting and len(active) < concurrency:
            active.append(waiting.popleft())
        plan, left = active.popleft()
        plan.requests.append(number)
        plan.dues.append(number / rate if rate else 0.0)
        number += 1
        if left > 1:
            active.append((plan, left - 1))
    return plans
