"""What the kernel's sessions send: whole and right frames, and the packet at hand untouched.

That every frame's lengths, checksums and addresses are right is checked by the bench
(tests/bpf/fast.py) on every frame of every test here.
"""

import itertools

import pytest

from pycopy.fastpath import kernel as kernel_module
from pycopy.fastpath import maps as maps_module
from pycopy.kernel import syscall
from pycopy.kernel.abi import LOG_BOUNDARY, FastCount, Left
from tests.bpf.fast import SECOND, Bench
from tests.bpf.frames import SYN_OPTIONS, padded
from tests.bpf.harness import Namespaces

#: Every short one, where odd ends and chunks of checksumming meet, and the longest.
LENGTHS = (*range(1, 67), 127, 128, 129, 255, 511, 512, 513, 515, 1023, 1024, 1025, 1447, 1448)

MATERIAL = bytes(number * 7 & 0xFF for number in range(70_000))

families = pytest.mark.parametrize("family", (4, 6))


@pytest.fixture(scope="module")
def bench():
    namespaces = Namespaces()
    namespaces.new()
    made = Bench()
    yield made
    made.close()
    namespaces.close()


@pytest.fixture(autouse=True)
def _nothing_strange(bench):
    before = bench.counts()
    yield
    after = bench.counts()
    assert after[FastCount.OUT_FAILED] == before[FastCount.OUT_FAILED]
    bench.clear()
    assert bench.free_slots() == bench.kernel.maps.slots


@families
@pytest.mark.parametrize("timestamps", (True, False))
def test_the_handshake(bench, family, timestamps):
    connection = bench.connection(family, timestamps=timestamps)
    syn, ack = connection.open()
    assert syn.flags == "S" and syn.ack == 0 and syn.window == 65535
    options = dict(syn.options)
    assert options["MSS"] == 1460 and options["WScale"] == 7
    assert ("Timestamp" in options) == timestamps == ("SAckOK" in options)
    assert ack.flags == "A" and ack.ack == connection.rcv_nxt and ack.seq == connection.seq
    assert ("Timestamp" in dict(ack.options)) == timestamps


@families
@pytest.mark.parametrize("timestamps", (True, False))
def test_every_length_at_once(bench, family, timestamps):
    left = bench.left()
    connection = bench.connection(family, timestamps=timestamps)
    connection.open()
    longest = () if timestamps else (1459, 1460)
    for number, length in enumerate((*LENGTHS, *longest)):
        request = MATERIAL[number : number + length]
        (sent,) = connection.ask(request)
        assert bytes(sent.payload) == request and sent.flags == "PA"
        assert sent.seq + length & 0xFFFFFFFF == connection.seq
        assert sent.ack == connection.rcv_nxt
        assert connection.answer(b"answer") == []
        connection.answered_online(6)
    assert bench.left() == left


@families
@pytest.mark.parametrize("timestamps", (True, False))
def test_every_length_out_of_the_log(bench, family, timestamps):
    """Held until the target has answered, and sent by the answer's own packet."""
    connection = bench.connection(family, timestamps=timestamps)
    connection.open()
    left = bench.left()
    longest = () if timestamps else (1459, 1460)
    assert len(connection.ask(b"first")) == 1
    for number, length in enumerate((*LENGTHS, *longest)):
        request = MATERIAL[number : number + length]
        connection.answered_online(100)
        assert connection.ask(request) == []
        (sent,) = connection.answer(b"a" * 100, acked=connection.seq - length)
        assert bytes(sent.payload) == request and sent.flags == "PA"
        assert sent.ack == connection.rcv_nxt
    assert bench.left() == left


@families
def test_several_held_are_released_in_order(bench, family):
    """All but the last as clones of what the answer's packet has become."""
    connection = bench.connection(family)
    connection.open()
    connection.ask(b"first")
    connection.answered_online(100)
    acked = connection.seq
    requests = [MATERIAL[:length] for length in (1448, 7, 513, 1)]
    assert [connection.ask(request) for request in requests] == [[]] * 4
    sent = connection.answer(b"a" * 100, acked=acked)
    assert [bytes(each.payload) for each in sent] == requests
    starts = itertools.accumulate((len(each) for each in requests[:-1]), initial=acked)
    assert [each.seq for each in sent] == [start & 0xFFFFFFFF for start in starts]


@families
def test_more_than_one_answer_releases_is_left_to_the_timer(bench, family):
    connection = bench.connection(family)
    connection.open()
    connection.ask(b"first")
    connection.answered_online(100)
    acked = connection.seq
    for number in range(7):
        assert connection.ask(b"%d" % number) == []
    sent = connection.answer(b"a" * 100, acked=acked)
    frames, handed_over = bench.tick()
    assert handed_over == []
    sent += [connection.check(each) for each in frames]
    assert b"".join(bytes(each.payload) for each in sent[:7]) == b"0123456"


@families
def test_an_acknowledgement_of_its_own_comes_late(bench, family):
    connection = bench.connection(family)
    connection.open()
    connection.ask(b"request")
    assert connection.answer(b"a" * 1000) == []
    assert bench.tick() == ([], [])
    bench.advance(bench.rules.delayed_ack_ns)
    (frame,), handed_over = bench.tick()
    ack = connection.check(frame)
    assert (ack.flags, ack.seq, ack.ack) == ("A", connection.seq, connection.rcv_nxt)
    assert handed_over == [] and bench.tick() == ([], [])
    # RFC 5681 4.2: every second full-sized segment at once.
    assert connection.answer(b"b" * 1448) == []
    (ack,) = connection.answer(b"c" * 1448)
    assert (ack.flags, ack.ack) == ("A", connection.rcv_nxt)


@families
def test_a_life_from_syn_to_time_wait(bench, family):
    before = bench.counts()
    connection = bench.connection(family)
    connection.open()
    connection.ask(b"request")
    connection.answered_online(6)
    assert connection.answer(b"answer") == []
    (fin,) = connection.ask(b"", "FA")
    assert fin.flags == "FA" and not bytes(fin.payload)
    (ack,) = connection.answer(b"", "FA")
    assert ack.flags == "A" and ack.ack == connection.rcv_nxt
    # Its FIN again: our ACK was lost.
    (again,) = bench.response(connection.target_frame("FA", seq=connection.rcv_nxt - 1))
    assert connection.check(again).ack == connection.rcv_nxt
    # The client's last bytes again, which were captured.
    assert bench.client(connection.client_frame("PA", b"request", back=8)) == []
    bench.advance(bench.rules.time_wait_ns)
    assert bench.tick() == ([], [])
    grown = {count: number - before[count] for count, number in bench.counts().items()}
    assert grown[FastCount.OPENED] == grown[FastCount.CLOSED] == 1
    assert grown[FastCount.DUPLICATE] == 1 and grown[FastCount.PAYLOAD] == 2
    assert grown[FastCount.OUT_SEGMENTS] == 6 and grown[FastCount.OUT_FIN] == 1


@families
def test_padding_of_short_frames_is_no_payload(bench, family):
    connection = bench.connection(family)
    connection.open()
    frame = padded(connection.client_frame("PA", b"x"), 100)
    (sent,) = bench.client(frame)
    # It goes along, as padding: behind what the IP header covers.
    length = len(connection.client_frame("PA", b"x"))
    assert bytes(connection.check(sent[:length]).payload) == b"x" and len(sent) == 100


def test_a_syn_with_little_room_for_options_is_user_spaces(bench):
    """The copy's options must fit where the client's were; its headers are not moved."""
    opened = bench.counts()[FastCount.OPENED]
    for options in ([], [("WScale", 7), ("NOP", 0)]):
        connection = bench.connection(4)
        assert bench.client(connection.client_frame("S", options=options)) == []
        ((record, _),) = bench.capture.records()
        assert record.seq == connection.seq
    assert bench.counts()[FastCount.OPENED] == opened


def test_segments_longer_than_the_path_takes_leave(bench):
    """Its MTU has become smaller since the session began."""
    before = bench.left().get(Left.HOP, 0)
    connection = bench.connection(4)
    connection.open()
    bench.set_hop(4, mss=1000)
    try:
        assert len(connection.ask(MATERIAL[:988])) == 1
        assert connection.ask(MATERIAL[:989]) == []
    finally:
        bench.set_hop(4)
    assert bench.left()[Left.HOP] == before + 1


def test_timestamps_that_the_target_does_not_want_take_room_all_the_same(bench):
    """They are replaced by NOPs, so a segment is as long as the client made it."""
    connection = bench.connection(4)
    syn = connection.client_frame("S", options=SYN_OPTIONS)
    (frame,) = bench.client(syn)
    connection.copy_port = connection.check(frame).sport
    connection.seq = connection.seq + 1 & 0xFFFFFFFF
    connection.online_nxt = connection.online_nxt + 1 & 0xFFFFFFFF
    bench.response(connection.target_frame("SA", options=[("MSS", 1460)]))
    connection.rcv_nxt += 1
    bench.client(connection.client_frame())
    (sent,) = connection.ask(MATERIAL[:1448])
    assert bytes(sent.payload) == MATERIAL[:1448] and sent.dataofs == 8
    assert all(name == "NOP" for name, _ in sent.options)
    before = bench.left().get(Left.HOP, 0)
    assert connection.ask(MATERIAL[:1449]) == []
    assert bench.left()[Left.HOP] == before + 1


def test_a_pass_over_few_sessions_is_one_call(bench, monkeypatch):
    """And it ends, whatever the number of slots."""
    connection = bench.connection(4)
    connection.open()
    connection.ask(b"in flight")
    calls = []

    def counted(*args):
        calls.append(args)
        return run(*args)

    run = syscall.RepeatedRun.run
    monkeypatch.setattr(syscall.RepeatedRun, "run", counted)
    bench.tick()
    assert len(calls) == 1


def test_a_pass_that_takes_more_than_a_turn_goes_on_in_the_next(bench, monkeypatch):
    """Or the last of many sessions would never be looked at."""
    timer = bench.kernel._module.program_fds["pycopy_timer"]
    bench.kernel._timer = syscall.RepeatedRun(timer, kernel_module._MATERIAL, 2)
    monkeypatch.setattr(kernel_module, "CALLS", 1)
    connections = [bench.connection(4) for _ in range(12)]
    for connection in connections:
        connection.open()
        connection.ask(b"request")
        connection.answer(b"a" * 100)
    bench.advance(bench.rules.delayed_ack_ns)
    acked = set()
    for _ in range(300):
        frames, _ = bench.tick()
        acked |= {connections[0].check(frame).sport for frame in frames}
    assert {connection.copy_port for connection in connections} <= acked


def test_a_timeout_hands_over_with_what_is_not_acknowledged(bench):
    connection = bench.connection(4)
    connection.open()
    connection.ask(b"acknowledged")
    connection.answer(b"answer")
    connection.answered_online(6)
    connection.ask(b"lost")
    bench.advance(SECOND)
    _, handed_over = bench.tick()
    ((session, logged),) = handed_over
    assert session.left == Left.TIMEOUT
    assert [data for _, data in logged] == [b"acknowledged", b"lost"]
    assert all(record.tcp_flags & LOG_BOUNDARY for record, _ in logged)
    bench.disown(session)


@families
def test_a_target_that_has_said_less_and_is_quiet_has_said_it_all(bench, family):
    left = bench.left()
    connection = bench.connection(family)
    connection.open()
    connection.ask(b"first")
    connection.answered_online(100)
    assert connection.answer(b"shorter") == []
    assert connection.ask(b"second") == []
    bench.advance(bench.rules.quiet_ns - 1)
    assert bench.tick() == ([], [])
    bench.advance(1)
    (frame,), handed_over = bench.tick()
    sent = connection.check(frame)
    assert bytes(sent.payload) == b"second" and sent.ack == connection.rcv_nxt
    assert handed_over == [] and bench.left() == left


@families
@pytest.mark.parametrize("said", (3 << 30, (1 << 32) - 50, (1 << 32) + 50))
def test_connections_over_which_gigabytes_have_come(bench, family, said):
    """Given by user space, as it would be then; its responses are still counted right."""
    left = bench.left().get(Left.ORDER, 0)
    connection = bench.connection(family)
    connection.open()
    connection.ask(b"first")
    connection.answered_online(100)
    connection.answer(b"a" * 100)
    bench.advance(bench.rules.delayed_ack_ns)
    bench.tick()
    state = connection.state()
    session, _ = bench.kernel.fetch_target(state.target)
    far = {
        name: getattr(session, name) + said & 0xFFFFFFFF
        for name in ("online_rcv_nxt", "online_need", "sent_need", "rcv_nxt", "rcv_acked",
                     "answered", "said_before", "snd_wl1")
    }  # fmt: skip
    far["snd_wl1"] = far["rcv_nxt"]
    assert bench.kernel.give(session._replace(**far))
    connection.answered_online(said)
    connection.rcv_nxt = connection.rcv_nxt + said & 0xFFFFFFFF
    for _ in range(3):
        assert [bytes(each.payload) for each in connection.ask(b"next")] == [b"next"]
        connection.answered_online(100)
        assert connection.ask(b"held") == []
        (held,) = connection.answer(b"a" * 100, acked=connection.seq - 4)
        assert bytes(held.payload) == b"held"
        connection.answer(b"")
    assert bench.left().get(Left.ORDER, 0) == left


def test_a_client_that_begins_again_at_once_stays_with_user_space(bench):
    """What is unread of it would be taken for the kernel's, which is younger."""
    opened = bench.counts()[FastCount.OPENED]
    connection = bench.connection(4)
    connection.open()
    session, _ = bench.kernel.fetch_target(connection.state().target)
    bench.disown(session)
    connection.seq = 5000
    again = connection.client_frame("S", options=SYN_OPTIONS)
    assert bench.client(again) == [] and len(bench.capture.records()) == 1
    bench.kernel.forget_disowned(lambda: True)
    assert bench.client(again) == [] and len(bench.capture.records()) == 1
    bench.kernel.forget_disowned(lambda: False)
    assert len(bench.client(again)) == 1
    assert bench.counts()[FastCount.OPENED] == opened + 2


def test_what_is_disowned_does_not_pile_up(bench, monkeypatch):
    """Not even where something is always unread."""
    monkeypatch.setattr(maps_module, "DISOWNED_MAX", 3)
    flows = bench.kernel.maps.by_name["flows"]
    keys = [bytes([number]) * 36 for number in range(5)]
    for key in keys:
        bench.kernel.own_online(key)
        bench.kernel.disown_online(key)
    assert [flows.lookup(key) is not None for key in keys] == [False] * 2 + [True] * 3
    bench.kernel.own_online(keys[3])
    bench.kernel.forget_disowned(lambda: False)
    assert [flows.lookup(key) is not None for key in keys] == [False] * 3 + [True, False]
    flows.delete(keys[3])
