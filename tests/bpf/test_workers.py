"""capture.c for several workers: together they record every flow, each exactly once."""

import random

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from pycopy.kernel.abi import CaptureCount
from pycopy.session.addresses import worker_of
from pycopy.wire.segment import KEY
from tests.bpf.conftest import SERVICES
from tests.bpf.frames import SERVER, SERVER6, tcp
from tests.bpf.harness import Capture

FLOWS = 300


@pytest.fixture(scope="module", params=[2, 5])
def programs(hook, request):
    made = [
        Capture(hook, services=SERVICES, worker=worker, workers=request.param)
        for worker in range(request.param)
    ]
    yield made
    for program in made:
        program.close()


def flows(seed):
    rng = random.Random(seed)
    for _ in range(FLOWS):
        if rng.random() < 0.5:
            ip = IP(src=f"192.0.2.{rng.randrange(1, 255)}", dst=SERVER)
        else:
            ip = IPv6(src=f"2001:db8::{rng.randrange(1, 65536):x}", dst=SERVER6)
        yield ip, rng.randrange(1024, 65536), rng.choice((80, 8080))


def test_every_flow_is_recorded_once(programs):
    found = [0] * len(programs)
    for ip, sport, dport in flows(1):
        for flags, payload in (("S", b""), ("PA", b"data"), ("FA", b"")):
            frame = tcp(sport, dport, flags=flags, payload=payload, ip=ip)
            records = [program.run(frame) for program in programs]
            ((worker, record),) = ((n, one) for n, one in enumerate(records) if one)
            assert len(record) == 1
            assert worker == worker_of(sport, len(programs))
            assert KEY.unpack(record[0][0].key)[2:] == (sport, dport)
            # The others have not even counted it.
            others = [each for n, each in enumerate(programs) if n != worker]
            assert not any(program.changed for program in others)
            assert programs[worker].changed == {CaptureCount.SELECTED: 1, CaptureCount.CAPTURED: 1}
        found[worker] += 1
    assert sum(found) == FLOWS
    assert min(found) > FLOWS / len(programs) / 2


def test_what_cannot_be_a_copy_is_counted_once(programs):
    """A pure ACK by whose flow it is; a fragment, whose ports may be unreadable, by the first."""
    for ip, sport, dport in flows(2):
        fates = [program.fate(tcp(sport, dport, flags="A", ip=ip)) for program in programs]
        mine = worker_of(sport, len(programs))
        assert fates[mine] is CaptureCount.PURE_ACK
        assert fates.count(None) == len(programs) - 1
    fragment = tcp(4711, 80, payload=b"x" * 64, ip=IP(src="192.0.2.7", dst=SERVER, flags="MF"))
    fates = [program.fate(fragment) for program in programs]
    assert fates == [CaptureCount.FRAGMENT] + [None] * (len(programs) - 1)
