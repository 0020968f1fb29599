from hypothesis import given
from hypothesis import strategies as st

from pycopy.session.receiving import MAX_RANGES, must_ack_now, receive
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
    assert not must_ack_now(mine, ())
    receive(mine, 200, 201)
    assert must_ack_now(mine, ())
    mine.rcv_acked = 201
    assert not must_ack_now(mine, ())
    assert must_ack_now(mine, ((300, 400),))  # it filled a gap
    receive(mine, 300, 400)
    assert must_ack_now(mine, ())
    mine.early, mine.fin_pos = (), 400
    assert must_ack_now(mine, ())
