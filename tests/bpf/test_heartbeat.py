"""Programs whose process is not heard of any more fall still: capturing first, swallowing later."""

import time

import pytest

from pycopy.kernel import abi
from pycopy.kernel.abi import CaptureCount, InterceptCount
from tests.bpf.fast import Bench
from tests.bpf.frames import CLIENT, tcp
from tests.bpf.harness import CONTINUE, Capture, Intercept, Namespaces, mapped

SECOND = 1_000_000_000
SELECTED, CAPTURED, LAPSED = CaptureCount.SELECTED, CaptureCount.CAPTURED, CaptureCount.LAPSED


def ago(seconds):
    return time.monotonic_ns() - round(seconds * SECOND)


def test_capture_stops_after_two_seconds_and_goes_on_with_the_next_beat(hook, port):
    program = Capture(hook, services=[(None, 80)], beat_ns=ago(0))
    frame = tcp(port, payload=b"x")
    for seconds, fate in (
        (0, CAPTURED), (1.5, CAPTURED), (2.1, LAPSED), (3600, LAPSED), (0, CAPTURED),
    ):  # fmt: skip
        program.beat(ago(seconds))
        assert program.call(frame) == CONTINUE[hook]
        assert program.changed == {SELECTED: 1, fate: 1}, seconds
        assert len(program.records()) == (fate is CAPTURED)
    program.close()


def test_without_any_beat_nothing_is_copied(hook, port):
    program = Capture(hook, services=[(None, 80)], beat_ns=0)
    program.call(tcp(port, payload=b"x"))
    assert program.changed == {SELECTED: 1, LAPSED: 1}
    program.close()


def test_a_beat_of_the_future_is_no_lapse(hook, port):
    """Another CPU's clock may be ahead by a little."""
    program = Capture(hook, services=[(None, 80)], beat_ns=ago(-1))
    program.call(tcp(port, payload=b"x"))
    assert program.changed == {SELECTED: 1, CAPTURED: 1}
    program.close()


@pytest.mark.parametrize("whole", [True, False], ids=["segment", "fragment"])
def test_swallowing_has_a_grace_of_ten_seconds(hook, whole):
    from scapy.layers.inet import IP

    program = Intercept(hook, beat_ns=ago(0))
    program.claim(mapped(CLIENT), 128, abi.SWALLOW)
    ip = IP(src="10.0.0.9", dst=CLIENT, flags=0 if whole else "MF")
    frame = tcp(80, 40000, payload=b"x" * 64, ip=ip)
    own = InterceptCount.CAPTURED if whole else InterceptCount.FRAGMENT
    for seconds, swallowed, fate in (
        (0, True, own), (2.5, True, own), (9.5, True, own),
        (10.1, False, InterceptCount.LAPSED), (3600, False, InterceptCount.LAPSED), (0, True, own),
    ):  # fmt: skip
        program.beat(ago(seconds))
        got, kind, records = program.run(frame)
        assert (got, kind) == (swallowed, fate), seconds
        assert len(records) == (kind is InterceptCount.CAPTURED)
    program.close()


def test_who_is_nobodys_passes_as_ever(hook):
    program = Intercept(hook, beat_ns=0)
    swallowed, kind, _ = program.run(tcp(80, 40000, ip="IPv4"))
    assert not swallowed and kind is InterceptCount.PASSED
    program.close()


def test_the_kernels_own_sessions_stop_as_well():
    """Nothing is cloned, acknowledged or released for a process that has gone."""
    namespaces = Namespaces()
    namespaces.new()
    bench = Bench(slots=64)
    try:
        connection = bench.connection()
        connection.open()
        bench.capture.beat(bench.now_ns - 3 * SECOND)
        assert bench.client(connection.client_frame("PA", b"request")) == []
        assert bench.capture.changed == {SELECTED: 1, LAPSED: 1}
        bench.capture.beat(bench.now_ns)
        (sent,) = connection.ask(b"request")
        assert bytes(sent.payload) == b"request"
        bench.intercept.beat(bench.now_ns - 9 * SECOND)
        frame = connection.target_frame("PA", b"response")
        assert bench.intercept.call(frame) != CONTINUE["tc"]
        bench.intercept.beat(bench.now_ns - 11 * SECOND)
        assert bench.intercept.call(frame) == CONTINUE["tc"]
        assert bench.intercept.changed[InterceptCount.LAPSED] == 1
    finally:
        bench.close()
        namespaces.close()
