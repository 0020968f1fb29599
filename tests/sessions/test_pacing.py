"""How far the copy runs ahead of a target whose answers are longer than the online server's.

A client that waits for each answer has one request open at the target, never more, however
slow the target; one that does not wait is not held up.
"""

import pytest

from tests.sessions.model import ACK, FIN, MS, PSH, SYN, Manners, Server
from tests.sessions.test_properties import Exchange, Weather, World, check_end

CALM = Weather(0, 0, 0)
ONLINE, REQUEST = 500, 100


class Observed(World):
    """A client with ``depth`` requests open at a time, one every ``step_ns``; round trip 1 ms."""

    def __init__(self, number, answer, think_ns, depth, step_ns):
        self.depth, self.step_ns = depth, step_ns
        exchanges = [Exchange(REQUEST, ONLINE, answer, False)] * number
        manners = Manners(think_ns=think_ns, options=13)
        super().__init__(exchanges, manners, CALM, CALM, seed=1)

    def record(self, exchanges, capture):
        at, captured_at = self.clock.at, self.captured
        at(0, captured_at, SYN, 0, 0, 0)
        at(MS, captured_at, ACK, 1, 1, 0)
        when, number = 10 * MS, len(exchanges)
        for index in range(number):
            known = max(index + 1 - self.depth, 0) * ONLINE
            at(when, captured_at, PSH | ACK, 1 + index * REQUEST, 1 + known, REQUEST)
            when += self.step_ns
        end = 1 + number * REQUEST
        at(when, captured_at, FIN | ACK, end, 1 + number * ONLINE, 0)
        self.captured_ns = when


@pytest.fixture
def seen(monkeypatch):
    """When each request was read at the target, and how many were open then, itself included."""
    read, respond, seen, answered = Server.read, Server.respond, [], []

    def watched_read(server):
        before = len(server.served)
        read(server)
        if len(server.served) > before:
            seen.append((server.clock.now_ns, len(server.served) - len(answered)))

    def watched_respond(server, size):
        answered.append(size)
        respond(server, size)

    monkeypatch.setattr(Server, "read", watched_read)
    monkeypatch.setattr(Server, "respond", watched_respond)
    return seen


@pytest.mark.parametrize("think_ns", [0, 50 * MS, 500 * MS])
@pytest.mark.parametrize("answer", [500, 501, 700, 1500, 5000, 100_000])
def test_a_client_that_waits(answer, think_ns, seen):
    world = Observed(60, answer, think_ns, depth=1, step_ns=3 * MS)
    world.run()
    check_end(world)
    assert [number for _, number in seen] == [1] * 60


@pytest.mark.parametrize("think_ns", [0, 5 * MS])
@pytest.mark.parametrize("answer", [500, 700, 5000])
def test_a_client_that_does_not_wait(answer, think_ns, seen):
    world = Observed(500, answer, think_ns, depth=50, step_ns=MS // 5)
    world.run()
    check_end(world)
    read_ns, _ = seen[-1]
    assert len(world.all_servers[0].served) == 500
    assert read_ns - world.captured_ns < 10 * MS
