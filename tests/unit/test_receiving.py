from hypothesis import given
from hypothesis import strategies as st

from pycopy.session.receiving import (
    MAX_RANGES,
    STRETCH_MAX,
    STRETCH_PAUSE,
    acknowledge,
    must_ack_now,
    receive,
)
from pycopy.session.views import Target


def target():
    made = Target(0, 1, 100, 0)
    made.rcv_nxt = made.rcv_acked = 1
    return made


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=40))
def test_agrees_with_a_set_of_bytes(segments):
    mine, bytes_there = target(), set()
    for start, size in segments:
        before = mine.rcv_nxt
        moved = receive(mine, start, start + size)
        bytes_there.update(range(start, start + size))
        following = 1
        while following in bytes_there:
            following += 1
        assert mine.rcv_nxt == following and moved == (following != before)
        beyond = {at for at in bytes_there if at > following}
        kept = [set(range(*each)) for each in mine.early]
        assert set().union(*kept) == beyond and sum(map(len, kept)) == len(beyond)


def test_the_latest_range_comes_first():
    mine = target()
    for start in 10, 30, 20:
        receive(mine, start, start + 5)
    assert mine.early == ((20, 25), (30, 35), (10, 15))
    receive(mine, 35, 40)
    assert mine.early == ((30, 40), (20, 25), (10, 15))


def test_ranges_are_bounded():
    mine = target()
    for number in range(2 * MAX_RANGES):
        receive(mine, 10 + 10 * number, 15 + 10 * number)
    assert len(mine.early) == MAX_RANGES
    receive(mine, 15, 20)  # merging is always possible
    assert len(mine.early) == MAX_RANGES - 1


def test_when_to_acknowledge():
    mine = target()
    receive(mine, 1, 200)
    assert not must_ack_now(mine, (), False)
    receive(mine, 200, 201)
    assert must_ack_now(mine, (), False)
    mine.rcv_acked = 201
    assert not must_ack_now(mine, (), False)
    assert must_ack_now(mine, ((300, 400),), True)  # it filled a gap
    receive(mine, 300, 400)
    assert must_ack_now(mine, (), True)
    mine.early, mine.fin_pos = (), 400
    assert must_ack_now(mine, (), True)


def answer(mine, size, pushed=True):
    """Whether so many bytes more are acknowledged at once; they are, if so."""
    receive(mine, mine.rcv_nxt, mine.rcv_nxt + size)
    at_once = must_ack_now(mine, (), pushed)
    if at_once:
        acknowledge(mine, late=False)
        mine.rcv_acked = mine.rcv_nxt
    return at_once


def test_a_stretch_is_what_the_target_has_sent_before():
    mine = target()
    assert answer(mine, 450) and mine.stretch == 5  # begun segments count
    assert not answer(mine, 500)
    assert answer(mine, 1) and mine.stretch == 6
    assert not answer(mine, 600) and mine.stretch == 6
    mine.rcv_acked = mine.rcv_nxt
    assert answer(mine, 300, pushed=False) and mine.stretch == 6


def test_a_stretch_has_a_longest():
    mine = target()
    assert answer(mine, 100 * STRETCH_MAX + 1) and mine.stretch == STRETCH_MAX
    assert not answer(mine, 100 * STRETCH_MAX + 1)


def test_an_acknowledgement_in_vain_makes_a_pause():
    mine = target()
    assert answer(mine, 300)
    assert not answer(mine, 199)
    acknowledge(mine, late=True)
    assert mine.stretch == 3  # it would have been late anyway
    mine.rcv_acked = mine.rcv_nxt
    assert not answer(mine, 200)
    acknowledge(mine, late=False)
    assert mine.stretch == 3
    acknowledge(mine, late=True)
    mine.rcv_acked = mine.rcv_nxt
    for left in reversed(range(STRETCH_PAUSE)):
        assert answer(mine, 200) and mine.stretch == -left
    assert answer(mine, 200) and mine.stretch == 2
    assert not answer(mine, 200)
