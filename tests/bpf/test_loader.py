"""Loading for real: maps and counters, what a user reads when it fails, what is left."""

import errno
import os
import struct

import pytest

from pycopy import loader
from pycopy.errors import HostUnfit
from pycopy.kernel import shapes, syscall
from pycopy.kernel.module import make_map

NAME = "intercept-tc-ether"


@pytest.fixture
def module():
    made = loader.load(NAME, entries={"segments": 4096})
    yield made
    made.close()


def test_maps(module):
    used = {"segments", "counts", "scratch", "settings", "heartbeat", "claims", "claims_default",
            "relays", "relay_work"}  # fmt: skip
    assert set(module.maps) == used
    assert syscall.program_info(module.program_fd).name == "pycopy_intercep"
    for name, each in module.maps.items():
        shape, info = shapes.SHAPES[name], syscall.map_info(each.fd)
        entries = 4096 if name == "segments" else shape.entries
        assert info[4:6] == (shape.value_bytes, entries) and info.type == shape.kind
        assert info.name == f"pycopy_{name}"[:15]


def test_a_trie(module):
    claims = module.maps["claims"]
    key, longer = struct.pack("=I16s", 96, bytes(16)), struct.pack("=I16s", 100, bytes(16))
    assert claims.lookup(key) is None
    claims.update(key, struct.pack("=I", 1))
    assert claims.lookup(longer) == struct.pack("=I", 1)
    assert claims.delete(key)
    assert not claims.delete(key)


def test_counters_are_summed_over_the_cpus(module):
    counts = module.maps["counts"]
    values = struct.pack("=Q", 5) * syscall.possible_cpus()
    assert len(counts.lookup(bytes(4))) == len(values)
    counts.update(bytes(4), values)
    assert counts.sum_percpu(0) == 5 * syscall.possible_cpus()
    with pytest.raises(IndexError):
        counts.sum_percpu(shapes.SHAPES["counts"].entries)


def test_run_statistics(module):
    stats = syscall.enable_run_stats()
    syscall.test_run(module.program_fd, bytes(64), repeat=100)
    assert syscall.program_info(module.program_fd).run_count == 100
    os.close(stats)


def test_maps_made_before_stay_their_makers(module):
    fd = make_map("heartbeat")
    other = loader.load(NAME, given={"heartbeat": fd, "nobody's": 99})
    assert other.maps["heartbeat"].fd == fd
    other.close()
    assert syscall.map_lookup(fd, bytes(4), 8) == bytes(8)
    os.close(fd)


def test_closed_means_gone():
    before = set(os.listdir("/proc/self/fd"))
    module = loader.load(NAME)
    ident = syscall.program_info(module.program_fd).id
    module.close()
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        os.close(syscall.program_fd_by_id(ident))


def test_a_failure_leaves_nothing_open(monkeypatch):
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(
        syscall, "program_load", lambda *_: (_ for _ in ()).throw(OSError(7, "big"))
    )
    with pytest.raises(loader.PycopyError):
        loader.load(NAME)
    assert set(os.listdir("/proc/self/fd")) == before


def test_no_memory_for_a_map_is_the_host_s_fault(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(syscall, "map_create", refuse)
    with pytest.raises(HostUnfit) as caught:
        loader.load(NAME)
    assert "no memory for the map segments" in caught.value.cause
    assert "--ring" in caught.value.cure
