"""Both ends of the channel over real sockets: routing, slowness, strangers, loss and return."""

import re
import socket
import threading
import time

import pytest

from pycopy.channel import (
    ChannelServer,
    Count,
    Fate,
    Hello,
    InterceptClient,
    Refusal,
    Visit,
    codec,
    server,
    stream,
)
from pycopy.channel.codec import (
    HEADER,
    MAGIC,
    Claim,
    Decoder,
    Ping,
    Placement,
    Pong,
    Range,
    Records,
    Refuse,
    Type,
    Welcome,
)
from pycopy.channel.listen import listen
from pycopy.errors import PycopyError
from pycopy.process.loop import Loop
from pycopy.wire.segment import KEY, KIND_CLIENT, KIND_TARGET, KIND_TOO_BIG, SEGMENT, Segment

LIMIT_S = 10


def addr(text: str) -> bytes:
    return bytes(10) + b"\xff\xff" + socket.inet_aton(text)


def key(number: int, client: str = "10.1.2.3") -> bytes:
    return KEY.pack(addr(client), addr("10.0.0.2"), number, 80)


def record(number: int, client: str = "10.1.2.3", kind: int = KIND_TARGET) -> bytes:
    fields = dict.fromkeys(Segment._fields, 0)
    fields |= {"kind": kind, "seq": number, "key": key(number % 65536, client), "sack": bytes(32)}
    return SEGMENT.pack(*fields.values())


def range_of(client: str, bits: int) -> Range:
    return Range(addr(client), 96 + bits)


class Bench:
    """One loop, one server, and whatever clients a test connects."""

    def __init__(self):
        self.loop = Loop()
        self.lines = []
        self.hellos = []
        self.refuse = ""
        self.endpoints = []
        self.socks = []
        self.got = {}
        self.states = {}
        self.serve(0)

    def serve(self, port):
        self.server = ChannelServer(
            self.loop,
            "127.0.0.1",
            port,
            placement=Placement.TARGET,
            instance=99,
            on_hello=self.on_hello,
            log=self.lines.append,
        )
        self.port = self.server.port

    def on_hello(self, hello, name):
        if self.refuse:
            raise Refusal(self.refuse)
        self.hellos.append(hello)

    def client(
        self, instance=1, ranges=(), claims=(), start=True, on_taken=lambda keys: None, **other
    ):
        name = len(self.got)
        self.got[name], self.states[name] = [], []
        client = InterceptClient(
            ("127.0.0.1", self.port),
            Hello(instance, tuple(ranges), **other),
            self.loop,
            on_records=self.got[name].extend,
            on_state=self.states[name].append,
            on_taken=on_taken,
            live_claims=lambda: claims,
        )
        client.got, client.states = self.got[name], self.states[name]
        if start:
            client.start()
            self.until(lambda: client.connected)
        self.endpoints.append(client)
        return client

    def until(self, condition, limit_s=LIMIT_S):
        end_ns = time.monotonic_ns() + int(limit_s * 1e9)
        while not condition():
            now_ns = time.monotonic_ns()
            assert now_ns < end_ns, f"not within {limit_s} s; log: {self.lines}"
            deadlines = [self.server.deadline_ns, now_ns + 20_000_000]
            self.loop.wait(min([*deadlines, *(e.deadline_ns for e in self.endpoints)]))
            now_ns = time.monotonic_ns()
            self.server.on_timer(now_ns)
            for endpoint in self.endpoints:
                endpoint.on_timer(now_ns)

    def replays(self):
        return self.server.snapshot()["connections"]["replays"]

    def raw(self, *chunks):
        """A peer by hand: sends ``chunks``, and stays."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)
        for chunk in chunks:
            sock.sendall(chunk)
        sock.setblocking(False)
        self.socks.append(sock)
        return sock

    def hears(self, sock, accepts=frozenset(Type)):
        """Frames until the server closes ``sock``."""
        decoder, frames, over = Decoder(accepts), [], []

        def closed():
            try:
                data = sock.recv(65536)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                data = b""
            frames.extend(decoder.feed(data))
            over.append(not data)
            return over[-1]

        self.until(closed)
        return frames


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    assert bench.server.balance() == []
    for endpoint in bench.endpoints:
        endpoint.close()
    bench.server.close()
    for sock in bench.socks:
        sock.close()
    bench.loop.close()


def numbers(client):
    return [segment.seq for segment in client.got]


def test_records_by_range_by_claim_and_to_all(bench):
    ranged = bench.client(1, [range_of("62.135.200.0", 24)])
    first, second = bench.client(2), bench.client(3)
    first.claim(key(5))
    first.flush()
    bench.until(lambda: bench.server.routes.claims)
    bench.server.forward([record(4, "62.135.200.9"), record(5), record(6)])
    bench.until(lambda: numbers(ranged) == [4])
    bench.until(lambda: numbers(first) == [5, 6] and numbers(second) == [6])
    fates = bench.server.fates
    assert fates == [1, 1, 1, 0, 0]
    assert type(first.got[0]) is Segment
    assert first.got[0] == Segment(*SEGMENT.unpack(record(5)))
    first.release(key(5))
    first.flush()
    bench.until(lambda: not bench.server.routes.claims)
    bench.server.forward([record(5)])
    bench.until(lambda: numbers(second) == [6, 5])
    assert bench.server.snapshot()["copies"]["sent"] == 6


def test_who_claims_what_is_taken_is_told(bench):
    told = []
    first, second = bench.client(1, claims=[key(1)]), bench.client(2, on_taken=told.append)
    bench.until(lambda: bench.server.routes.claims)
    second.claim(key(1))
    second.claim(key(2))
    second.flush()
    bench.until(lambda: told)
    assert told == [(key(1),)]
    bench.server.forward([record(1), record(2)])
    bench.until(lambda: numbers(first) == [1] and numbers(second) == [2])
    assert bench.server.snapshot()["claims"]["refused"] == 1


def test_nobody_to_send_to_is_counted(bench):
    bench.client(1, [range_of("62.135.200.0", 24)])
    bench.server.forward([record(1), record(2)])
    assert bench.server.fates[Fate.NO_REPLAY] == 2


def test_one_drain_is_one_frame_and_large_ones_are_cut(bench):
    sock = bench.raw(Hello(4).encode())
    bench.until(lambda: bench.replays())
    count = codec.MAX_RECORDS * 2 + 7
    bench.server.forward(record(n) for n in range(count))
    bench.server.forward([])
    bench.server.close()
    welcome, *progress, bye = bench.hears(sock)
    assert isinstance(welcome, Welcome)
    assert [p.total for p in progress] == [585, 1170, 1177]
    assert b"".join(p.records for p in progress) == b"".join(record(n) for n in range(count))
    assert bye.total == count


def test_a_slow_replay_loses_records_and_knows_how_many(bench, monkeypatch):
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", 200_000)
    fast = bench.client(1)
    slow = bench.client(2)
    slow_fd = slow._stream._sock.fileno()
    bench.loop.change(slow_fd, 0)
    count = 0
    while not any(r.dropped for r in bench.server._replays):
        bench.server.forward(record(n) for n in range(count, count + 1000))
        count += 1000
        bench.until(lambda: len(fast.got) == count)  # noqa: B023
        assert all(r.unsent_bytes < 200_000 + 65536 for r in bench.server._replays)
        assert count < 2_000_000
    assert bench.server.fates[Fate.TO_ALL] == count
    bench.loop.change(slow_fd, 1)
    # No further record comes: the heart-beat tells how many are missing.
    bench.until(lambda: len(slow.got) + slow.counts[Count.DROPPED_BY_INTERCEPT] == count)
    dropped = slow.counts[Count.DROPPED_BY_INTERCEPT]
    assert dropped == bench.server.snapshot()["copies"]["dropped_slow"] > 0
    bench.server.forward([record(7)])
    bench.until(lambda: slow.got[-1].seq == 7)
    assert slow.counts[Count.DROPPED_BY_INTERCEPT] == dropped
    assert fast.counts[Count.DROPPED_BY_INTERCEPT] == 0
    assert bench.server.snapshot()["copies"]["made"] == 2 * (count + 1)


def test_too_slow_for_everybody_is_a_fate(bench, monkeypatch):
    monkeypatch.setattr(server, "MAX_UNSENT_BYTES", 0)
    bench.client(1)
    bench.server.forward([record(1)])
    assert bench.server.fates[Fate.REPLAY_SLOW] == 1


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(14), b"\xff" * 5000, HEADER.pack(MAGIC, 1, 0, 2**32 - 1)],
    ids=["http", "tcpcopy", "long", "length"],
)
def test_garbage_is_told_counted_and_shown_out(bench, garbage):
    good = bench.client(1)
    sock = bench.raw(garbage)
    (refuse,) = bench.hears(sock)
    assert "pycopy intercept" in refuse.text
    assert bench.server.visits[Visit.GARBAGE] == 1
    assert any("does not speak the pycopy channel" in line for line in bench.lines)
    bench.server.forward([record(1)])
    bench.until(lambda: numbers(good) == [1])


def test_garbage_after_a_good_hello_frees_its_claims(bench):
    sock = bench.raw(Hello(4).encode(), Claim((key(1),)).encode())
    bench.until(lambda: bench.server.routes.claims)
    sock.sendall(b"nonsense")
    bench.hears(sock)
    assert bench.server.routes.claims == {}
    assert bench.server.visits[Visit.GARBAGE] == 1


def test_claims_from_a_replay_with_ranges_are_a_violation(bench):
    sock = bench.raw(Hello(4, (range_of("10.0.0.0", 8),)).encode(), Claim((key(1),)).encode())
    *_, refuse = bench.hears(sock)
    assert isinstance(refuse, Refuse)


def test_one_byte_blocks_nobody_and_is_shown_out_in_time(bench, monkeypatch):
    monkeypatch.setattr(stream, "GREETING_NS", 300_000_000)
    sock = bench.raw(MAGIC[:1])
    good = bench.client(1)
    bench.server.forward([record(1)])
    bench.until(lambda: numbers(good) == [1])
    bench.hears(sock)
    assert bench.server.visits[Visit.NO_HELLO] == 1


def test_a_flood_of_strangers_keeps_nobody_out(bench):
    for _ in range(server.MAX_STRANGERS * 4):
        bench.raw()
    good = bench.client(1)
    bench.server.forward([record(1)])
    bench.until(lambda: numbers(good) == [1])
    for _ in range(50):
        bench.raw(b"x")
    bench.until(lambda: bench.server.visits[Visit.GARBAGE] == 50)
    assert len(bench.lines) < 10


def test_the_number_of_replays_is_bounded(bench, monkeypatch):
    monkeypatch.setattr(server, "MAX_REPLAYS", 1)
    bench.client(1)
    sock = bench.raw(Hello(2).encode())
    (refuse,) = bench.hears(sock)
    assert "1 replays are connected already" in refuse.text


def test_the_owner_may_refuse(bench):
    bench.refuse = "no room for the ranges"
    with pytest.raises(PycopyError, match="no room for the ranges"):
        connect(bench, stranger(("127.0.0.1", bench.port)))


def test_other_version_is_told_which_side_to_upgrade(bench):
    for protocol, host in ((codec.PROTOCOL + 1, "intercept's"), (0, "replay's")):
        later = HEADER.pack(MAGIC, Type.HELLO, 0, 40)
        later += b"PYCP" + protocol.to_bytes(2, "little") + bytes(34)
        (refuse,) = bench.hears(bench.raw(later))
        assert f"upgrade pycopy on the {host} host" in refuse.text
        assert f"channel {protocol}" in refuse.text
    assert bench.server.visits[Visit.OTHER_VERSION] == 2


def test_silence_is_death_and_a_ping_is_answered(bench, monkeypatch):
    monkeypatch.setattr(stream, "PING_NS", 100_000_000)
    monkeypatch.setattr(stream, "DEAD_NS", 500_000_000)
    alive = bench.client(1)
    frozen = bench.raw(Hello(2).encode())
    bench.until(lambda: bench.replays() == 2)
    frames = bench.hears(frozen)
    assert [type(frame) for frame in frames] == [Welcome, Ping]
    assert bench.server.visits[Visit.LOST] == 1
    assert bench.replays() == 1
    assert alive.connected
    assert any("silent for" in line for line in bench.lines)


@pytest.mark.alone  # 20 MB through one thread, in bounded time
def test_pings_from_a_peer_that_never_reads_do_not_pile_up(bench):
    sock = bench.raw(Hello(1).encode())
    bench.until(lambda: bench.replays())
    (replay,) = bench.server._replays
    pings = memoryview(Ping(0).encode() * 1000)
    sent = 0

    def send():
        nonlocal sent
        try:
            while True:
                sent += sock.send(pings[sent % len(pings) :])
        except BlockingIOError:
            pass
        assert replay.unsent_bytes <= len(Pong(0).encode())
        # More than the sockets hold: the server has gone on reading.
        return replay.unsent_bytes and sent > 20_000_000

    bench.until(send)
    sock.close()
    bench.until(lambda: not bench.replays())


def test_the_same_instance_again_replaces_its_old_connection(bench):
    old = bench.raw(Hello(5).encode(), Claim((key(1),)).encode())
    bench.until(lambda: bench.server.routes.claims)
    new = bench.client(5)
    bench.hears(old)
    assert bench.server.visits[Visit.REPLACED] == 1
    bench.server.forward([record(1)])
    bench.until(lambda: numbers(new) == [1])


def test_a_replay_comes_back_and_claims_again(bench):
    client = bench.client(1, claims=[key(1), key(2)])
    bench.until(lambda: len(bench.server.routes.claims) == 2)
    port = bench.port
    bench.server.close()
    bench.until(lambda: not client.connected)
    client.claim(key(9))
    client.flush()
    bench.until(lambda: len(client.states) == 2)
    bench.serve(port)
    bench.until(lambda: client.connected)
    bench.until(lambda: set(bench.server.routes.claims) == {key(1), key(2)})
    bench.server.forward([record(1), record(2)])
    bench.until(lambda: numbers(client) == [1, 2])
    assert client.counts[Count.RECONNECTS] == 1
    assert client.counts[Count.DROPPED_BY_INTERCEPT] == 0
    assert "has been stopped there" in client.states[0]
    assert "connected again" in client.states[-1]


def test_bye_is_a_clean_end(bench):
    client = bench.client(1)
    client.close()
    bench.until(lambda: bench.server.visits[Visit.LEFT] == 1)
    assert not client.connected


def test_records_lost_with_their_replay_are_counted(bench):
    sock = bench.raw(Hello(1).encode())
    bench.until(lambda: bench.replays())
    (replay,) = bench.server._replays
    count = 0
    while not replay.unsent_records:
        bench.server.forward(record(n) for n in range(1000))
        count += 1000
    sock.close()
    bench.until(lambda: not bench.replays())
    copies = bench.server.snapshot()["copies"]
    assert copies["lost_with_replay"] > 0
    assert copies["made"] == count


def connect(bench, client, timeout_s=3):
    """connect_blocking() while the bench's server runs in the same thread."""
    thread = threading.Thread(target=client.connect_blocking, args=(timeout_s,))
    errors = []
    threading.excepthook, before = lambda args: errors.append(args.exc_value), threading.excepthook
    try:
        thread.start()
        while thread.is_alive():
            bench.loop.wait(time.monotonic_ns() + 5_000_000)
        thread.join()
    finally:
        threading.excepthook = before
    if errors:
        raise errors[0]


def stranger(address, on_state=lambda text: None):
    """A client with a loop of its own, as in another process."""
    return InterceptClient(
        address, Hello(1), Loop(), on_records=lambda records: None, on_state=on_state
    )


def test_connect_blocking(bench):
    client = stranger(("localhost", bench.port))
    connect(bench, client)
    assert client.connected
    client.close()
    bench.until(lambda: bench.server.visits[Visit.LEFT] == 1)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def failing(address, timeout_s=1.0):
    said = []
    client = stranger(address, said.append)
    with pytest.raises(PycopyError) as caught:
        client.connect_blocking(timeout_s)
    assert not client.connected
    assert said == []
    return caught.value


def test_refused_connection_says_what_to_check():
    port = closed_port()
    error = failing(("127.0.0.1", port))
    assert error.cause == f"127.0.0.1:{port} refused the connection: nothing listens there"
    assert "is `pycopy intercept` running on 127.0.0.1?" in error.cure


def test_unresolvable_name():
    error = failing(("no-such-host.invalid", 36524))
    assert "cannot resolve the intercept's name 'no-such-host.invalid'" in error.cause


def test_something_else_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        error = failing(("127.0.0.1", sock.getsockname()[1]), 0.3)
    assert "does not answer as a pycopy intercept" in error.cause


def test_something_else_answers():
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def answer():
            peer, _ = sock.accept()
            with peer:
                peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                peer.recv(100)

        thread = threading.Thread(target=answer)
        thread.start()
        error = failing(("127.0.0.1", sock.getsockname()[1]))
        thread.join()
    assert "does not speak the pycopy channel" in error.cause


def test_a_routers_message_is_a_record_as_well(bench):
    client = bench.client(1)
    bench.server.forward([record(1, kind=KIND_TOO_BIG)])
    bench.until(lambda: numbers(client) == [1])


def test_an_intercept_that_sends_nonsense_records_is_dropped(bench):
    client = bench.client(1)
    bench.server.forward([record(1, kind=KIND_CLIENT)])
    bench.until(lambda: not client.connected)
    assert client.counts[Count.GARBAGE] == 1
    assert client.got == []


def test_busy_port_names_it_and_the_way_out():
    loop = Loop()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(PycopyError) as caught:
            ChannelServer(
                loop,
                "127.0.0.1",
                port,
                placement=Placement.TARGET,
                instance=1,
                on_hello=lambda hello, name: None,
                log=print,
            )
    assert f"port {port} of 127.0.0.1 is in use" in caught.value.cause
    assert "-p" in caught.value.cure
    with pytest.raises(PycopyError, match="not an address of this host"):
        listen("192.0.2.77", 0)
    loop.close()


def test_listens_on_both_families():
    sock = listen("", 0)
    port = sock.getsockname()[1]
    for host in ("127.0.0.1", "::1"):
        socket.create_connection((host, port), timeout=5).close()
    sock.close()


def test_progress_total_going_back_is_garbage(bench):
    client = bench.client(1)
    (replay,) = bench.server._replays
    replay.send(Records(0, record(1)).encode())
    replay.flush()
    bench.until(lambda: client.counts[Count.GARBAGE] == 1)


def test_a_line_names_the_peer(bench):
    bench.raw(b"x")
    bench.until(lambda: bench.lines)
    assert re.match(r"127\.0\.0\.1:\d+ does not speak", bench.lines[0])
