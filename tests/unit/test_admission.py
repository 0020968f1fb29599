import struct

import pytest

from pycopy.session import admission
from pycopy.session.admission import Admission
from pycopy.session.fates import Fate
from pycopy.session.rules import SECOND, Rules
from pycopy.wire.segment import ACK, FIN, RST, Segment

LATE = 3600 * SECOND


def key(number, port=40000, server=0):
    return struct.pack("!12xIB15xHH", number, server, port, 80)


def segment(of, seq=1, ack=1, size=10, flags=ACK):
    zero = Segment(0, *[0] * 15, b"", bytes(32))
    return zero._replace(key=of, seq=seq, ack=ack, payload_bytes=size, tcp_flags=flags)


@pytest.mark.parametrize("percent", [1, 10, 50, 99])
def test_the_share_is_right_and_stable(percent):
    clients = [key(number) for number in range(20_000)]
    first, second = (Admission(Rules(sample_percent=percent), 0) for _ in range(2))
    chosen = [client for client in clients if first.refuse_new(client, 0) is None]
    assert abs(len(chosen) / len(clients) - percent / 100) < 0.01
    assert all(second.refuse_new(client, LATE) is None for client in reversed(chosen))


def test_all_connections_of_a_client_share_its_fate():
    chooser = Admission(Rules(sample_percent=50), 0)
    for number in range(50):
        assert len({chooser.refuse_new(key(number, port), 0) for port in range(1, 100)}) == 1
        assert len({chooser.refuse_new(key(number, 1, server), 0) for server in range(20)}) == 1


def test_the_ramp_rises_to_the_sample():
    start_ns = 777 * SECOND
    chooser = Admission(Rules(ramp=True, sample_percent=40), start_ns)
    clients = [key(number) for number in range(5000)]
    shares = []
    for second in 0, 19, 39, 99:
        chosen = [
            each for each in clients if not chooser.sampled_out(each, start_ns + second * SECOND)
        ]
        shares.append(len(chosen) / len(clients))
    assert shares == sorted(shares)
    assert [round(100 * share) for share in shares] == pytest.approx([1, 20, 40, 40], abs=2)


@pytest.mark.parametrize("end", [FIN, RST, RST | ACK])
def test_left_out_by_the_ramp_for_its_lifetime(end):
    chooser, left_out = Admission(Rules(ramp=True), 0), key(5)
    assert chooser.refuse_new(left_out, 0) is Fate.SAMPLED_OUT
    assert chooser.refuse_midstream(segment(left_out), LATE) is Fate.SAMPLED_OUT
    assert chooser.refuse_midstream(segment(left_out, size=0, flags=end), LATE) is Fate.STRAY
    assert chooser.refuse_midstream(segment(left_out), LATE) is None


def test_memory_is_bounded_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(admission, "REMEMBERED_MAX", 10)
    chooser = Admission(Rules(), 0)
    for number in range(25):
        chooser.watch(key(number), 7)
        chooser.ended(key(number), 100)
    chooser.watch(key(24), 8)
    assert len(chooser._watched) == len(chooser._ended) == 10
    assert chooser.refuse_midstream(segment(key(0), ack=7), LATE) is None
    assert chooser.refuse_midstream(segment(key(24), 100, ack=8), LATE) is Fate.REFUSED_MID_STREAM


def test_leftovers_of_a_session_that_is_over():
    chooser = Admission(Rules(), 0)
    chooser.ended(key(1), 5)
    assert chooser.refuse_midstream(segment(key(1), seq=0xFFFFFFF0), LATE) is Fate.DUPLICATE
    assert chooser.refuse_midstream(segment(key(1), seq=5), LATE) is None
    chooser.over(key(1))
    assert chooser.refuse_midstream(segment(key(1), seq=0xFFFFFFF0), LATE) is None


def test_a_new_connection_forgets_the_old():
    chooser = Admission(Rules(ramp=True), 0)
    assert chooser.refuse_new(key(5), 0) is Fate.SAMPLED_OUT
    assert chooser.refuse_new(key(5), LATE) is None
    assert chooser.refuse_midstream(segment(key(5)), LATE) is None
    chooser.watch(key(5), 7)
    assert chooser.refuse_new(key(5), LATE) is None
    assert chooser.refuse_midstream(segment(key(5), ack=7), LATE) is None


def test_quiet_since_the_start():
    chooser = Admission(Rules(), LATE)
    assert chooser.refuse_midstream(segment(key(5)), LATE + SECOND // 10) is Fate.REFUSED_MID_STREAM
    assert chooser.refuse_midstream(segment(key(6)), LATE + SECOND) is None
