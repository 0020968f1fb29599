from pycopy.session.stream import (
    HORIZON_BYTES,
    Offer,
    next_request,
    offer,
    offer_reset,
    resume,
    ripen,
)
from pycopy.session.views import Chunk, Online, unwrap
from pycopy.wire.segment import ACK, FIN, PSH, RST

BYTES = bytes(range(256)) * 8


def chunk(start, end, need=0, flags=PSH | ACK):
    return Chunk(start, BYTES[start:end], flags, need, 0)


def queued(online):
    return b"".join(each.data for each in online.queue)


def test_in_order():
    online = Online(0)
    assert offer(online, chunk(1, 11)) is Offer.IN_ORDER
    assert offer(online, chunk(11, 21)) is Offer.IN_ORDER
    assert queued(online) == BYTES[1:21] and online.snd_nxt == 21 and online.held_bytes == 20


def test_every_byte_once():
    online = Online(0)
    offer(online, chunk(1, 11))
    assert offer(online, chunk(1, 11)) is Offer.DUPLICATE
    assert offer(online, chunk(5, 15)) is Offer.IN_ORDER
    assert queued(online) == BYTES[1:15] and online.held_bytes == 14


def test_early_ones_wait_and_ripen():
    online = Online(0)
    for start, end in (21, 31), (11, 21), (31, 41), (25, 45):
        assert offer(online, chunk(start, end)) is Offer.EARLY
    assert offer(online, chunk(12, 20)) is Offer.DUPLICATE
    assert ripen(online) == 0 and online.held_bytes == 50
    offer(online, chunk(1, 11))
    assert ripen(online) == 1  # 31 to 41 is within 25 to 45
    assert queued(online) == BYTES[1:45] and not online.early and online.held_bytes == 44


def test_only_what_is_within_one_early_piece_is_a_repeat():
    online = Online(0)
    for start, end in (11, 21), (31, 41):
        offer(online, chunk(start, end))
    assert offer(online, chunk(12, 25)) is Offer.EARLY  # 21 to 25 are new
    assert offer(online, chunk(32, 40)) is Offer.DUPLICATE
    assert online.held_bytes == 33


def test_thousands_of_early_ones_are_cheap():
    online = Online(0)
    for start in range(2, 60_002, 2):
        assert offer(online, Chunk(start, b"x", 0, 0, 0)) is Offer.EARLY
    assert len(online.early) == 30_000


def test_a_fin_is_the_end():
    online = Online(0)
    offer(online, chunk(1, 11, flags=FIN))
    assert online.fin_pos == 11 and online.snd_nxt == 12
    assert offer(online, chunk(12, 22)) is Offer.DUPLICATE


def test_boundaries_and_needs():
    online = Online(0)
    needs = [0, 0, 50, 40, 90]
    for number, need in enumerate(needs):
        offer(online, chunk(1 + 10 * number, 11 + 10 * number, need))
    assert [each.boundary for each in online.queue] == [True, False, True, False, True]
    assert [each.need for each in online.queue] == [0, 0, 50, 50, 90]


def test_far_away():
    online = Online(0)
    assert offer(online, Chunk(HORIZON_BYTES + 2, b"x", 0, 0, 0)) is Offer.OUTSIDE
    assert offer(online, Chunk(HORIZON_BYTES + 1, b"x", 0, 0, 0)) is Offer.EARLY


def test_resets():
    online = Online(0)
    offer(online, chunk(1, 11))
    assert offer_reset(online, chunk(10, 10, flags=RST)) is Offer.OUTSIDE
    assert offer_reset(online, chunk(12 + HORIZON_BYTES, 0, flags=RST)) is Offer.OUTSIDE
    assert offer_reset(online, chunk(11 + HORIZON_BYTES, 0, flags=RST)) is Offer.IN_ORDER
    assert offer_reset(online, chunk(15, 15, flags=RST)) is Offer.IN_ORDER
    assert online.queue[-1].pos == online.queue[-1].end == online.snd_nxt == 11
    assert offer_reset(online, chunk(11, 11, flags=RST)) is Offer.IN_ORDER


def test_next_request():
    assert next_request([chunk(11, 21, 50)]) == 1
    assert next_request([chunk(11, 21, 50), chunk(21, 31, 50), chunk(31, 41, 60)]) == 2
    behind_another_gap = [chunk(11, 21, 50), chunk(31, 41, 60), chunk(41, 51, 60)]
    assert next_request(behind_another_gap) == 3
    nothing_known_before_it = [chunk(11, 21, 60), chunk(21, 31, 50)]
    assert next_request(nothing_known_before_it) == 2
    only_a_fin = [chunk(11, 21, 50), chunk(21, 21, 60, FIN)]
    assert next_request(only_a_fin) == 2


def test_resume_divides_what_is_held():
    online = Online(7)
    online.irs, online.rcv_nxt = 3, 99
    online.early = [chunk(11, 21, 50), chunk(21, 41, 60)]
    online.held_bytes = 30
    successor = resume(online, online.early[1:])
    assert (successor.iss, successor.irs, successor.rcv_nxt) == (7, 3, 99)
    assert (successor.snd_nxt, successor.held_bytes, online.held_bytes) == (21, 20, 10)
    assert ripen(successor) == 0 and queued(successor) == BYTES[21:41]
    assert resume(online, []).early == []


def test_split_and_trim():
    whole = chunk(1, 101, 5, FIN | PSH)
    whole.boundary = True
    front = whole.split(40)
    assert (front.pos, front.end, front.flags, front.records, front.boundary) == (1, 41, 0, 0, True)
    assert (whole.pos, whole.end, whole.records, whole.boundary) == (41, 102, 1, False)
    assert front.data + whole.data == BYTES[1:101] and front.need == whole.need == 5


def test_unwrap_follows_the_stream_around():
    position, origin = 1, 0xFFFFFFF0
    for step in range(1, 30):
        expected = 1 + step * (1 << 29)
        position = unwrap(position, origin, (origin + expected) & 0xFFFFFFFF)
        assert position == expected
    assert unwrap(100, origin, (origin + 50) & 0xFFFFFFFF) == 50
