"""What is one worker's of a run, and the sum of what all of them count."""

import ipaddress

import pytest

from pycopy.command.config import ReplayConfig
from pycopy.errors import UsageError
from pycopy.session.addresses import (
    PORTS,
    TRIES,
    KeptAddresses,
    PooledAddresses,
    own_ports,
    worker_of,
)
from pycopy.wire.segment import KEY
from pycopy.workers import shares

NUMBERS = (2, 3, 4, 7, 16, 64)


@pytest.mark.parametrize("workers", NUMBERS)
@pytest.mark.parametrize("step", [1, 2, 3, 8, 64, 89])
def test_flows_are_spread_evenly(workers, step):
    """Ports as kernels and load generators give them out: one after the other, or some apart."""
    ports = range(1024, 65536, step)
    found = [0] * workers
    for port in ports:
        found[worker_of(port, workers)] += 1
    fair = len(ports) / workers
    # Six standard deviations of a fair die: a bad hash is beside it by far more.
    assert max(abs(number - fair) for number in found) < 6 * fair**0.5


@pytest.mark.parametrize("workers", NUMBERS)
def test_every_port_is_one_workers(workers):
    configs = [ReplayConfig(workers=workers, worker=worker) for worker in range(workers)]
    given = sorted(port for config in configs for port in own_ports(config.worker, config.workers))
    assert given == list(PORTS)
    owns = [shares.Own(config) for config in configs]
    for port in (1, 1023, 4711, 65535):
        key = KEY.pack(bytes(16), bytes(16), port, 80)
        owners = [worker for worker, own in enumerate(owns) if own.has(key)]
        assert owners == [worker_of(port, workers)]


def test_a_single_one_has_all_ports():
    assert own_ports(0, 1) is PORTS
    assert shares.Own(ReplayConfig()).has(KEY.pack(bytes(16), bytes(16), 443, 80))


@pytest.mark.parametrize("kind", ["kept", "pool"])
def test_another_port_is_the_workers_own(kind):
    config = ReplayConfig(workers=64, worker=5)
    own, ports = shares.Own(config), own_ports(config.worker, config.workers)
    pool = [ipaddress.ip_network("10.9.9.9/32")]
    addresses = (
        KeptAddresses(ports) if kind == "kept" else PooledAddresses(pool, frozenset(), ports)
    )
    used = set()
    for _ in range(TRIES):
        client = bytes(10) + b"\xff\xff\x0a\0\0\1"
        key = addresses.allocate(client, ports[-1], bytes(10) + b"\xff\xff\x0a\0\0\2", 80,
                                 lambda key: key not in used)  # fmt: skip
        assert key is not None and own.has(key)
        used.add(key)


@pytest.mark.parametrize("workers", NUMBERS)
def test_ports_of_the_zero_route_mode_are_parted(workers):
    parts = shares.split_ports((20000, 20100), workers)
    assert [port for low, high in parts for port in range(low, high + 1)] == list(
        range(20000, 20101)
    )
    sizes = [high - low for low, high in parts]
    assert max(sizes) - min(sizes) <= 1


def test_fewer_ports_than_workers():
    with pytest.raises(UsageError, match="20000-20002 are too few for 4"):
        shares.split_ports((20000, 20002), 4)


def test_limits_are_of_the_whole_run():
    config = ReplayConfig(workers=3, max_sessions=1000, memory_mb=600)
    parts = shares.split(config, (20000, 20299))
    assert sum(part.max_sessions for part in parts) == 1000
    assert [part.memory_mb for part in parts] == [200] * 3
    assert [part.worker for part in parts] == [0, 1, 2]
    assert [part.self_ports for part in parts] == [(20000, 20099), (20100, 20199), (20200, 20299)]
    assert {part.ring_bytes for part in parts} == {config.ring_bytes}
    assert shares.split(config, None)[2].self_ports is None


def ledger(kernel, user, **more):
    both = kernel + user
    return {
        "segments": {"captured": both, **more},
        "fastpath": {"kernel_segments": kernel, "user_segments": user,
                     "kernel_percent": round(100 * kernel / both, 2) if both else 0.0},
        "process": {"rss_mb": 30},
    }  # fmt: skip


def test_counters_are_added_and_shares_computed_anew():
    one, two = ledger(90, 10), ledger(0, 300)
    two["sending"] = {"error_ENOBUFS": 3}
    assert shares.total([one, two]) == {
        "segments": {"captured": 400},
        "fastpath": {"kernel_segments": 90, "user_segments": 310, "kernel_percent": 22.5},
        "process": {"rss_mb": 60},
        "sending": {"error_ENOBUFS": 3},
    }
    assert one == ledger(90, 10)
    assert shares.total([]) == {}
    assert shares.total([ledger(0, 0)])["fastpath"]["kernel_percent"] == 0.0


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [(("yes", "yes"), "yes"), (("yes", "no"), "no"), (("no", "yes"), "no")],
)
def test_it_balances_if_each_does(verdicts, together):
    ledgers = [ledger(1, 1, balanced=verdict) for verdict in verdicts]
    assert shares.total(ledgers)["segments"] == {"captured": 4, "balanced": together}


def test_no_verdict_while_one_is_missing():
    for ledgers in ([ledger(1, 1, balanced="yes"), ledger(1, 1)],
                    [ledger(1, 1), ledger(1, 1, balanced="yes")]):  # fmt: skip
        assert shares.total(ledgers)["segments"] == {"captured": 4}
