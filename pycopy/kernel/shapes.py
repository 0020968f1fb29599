"""The maps of the BPF programs: their numbers in the text (``enum pycopy_map``) and their shapes.

Twin of ``enum pycopy_map`` in bpf/pycopy.h, as abi.py is of the structs there;
tests/bpf/test_abi.py compares both. How many entries a map has where that depends on the run
or on the host, whoever makes it says. Nothing here makes a map.

Tests: tests/bpf/test_abi.py
"""

from typing import NamedTuple

from pycopy.kernel import abi, syscall
from pycopy.kernel.abi import CaptureCount, InterceptCount
from pycopy.wire.segment import KEY


class Shape(NamedTuple):
    """What bpf(2) must know to make a map; ``entries`` is its size unless somebody says another.

    ``lock_first``: its values begin with a ``struct bpf_spin_lock``.
    """

    kind: int
    key_bytes: int
    value_bytes: int
    entries: int = 1
    flags: int = 0
    lock_first: bool = False


#: Addresses of this host that are remembered at most.
LOCAL_ADDRESSES = 4096
#: Client flows in their handshake: a burst of this many is remembered, the oldest are forgotten.
HANDSHAKES = 16384
#: Ranges of addresses that all replays of one intercept claim together.
CLAIMS = 4096

_ADDRESS, _PORTS = 16, 1 << 16

#: In the order of their numbers, which begin with 1.
SHAPES: dict[str, Shape] = {
    # A ring's entries are its bytes; a perf event array has one for each CPU.
    "segments": Shape(syscall.RINGBUF, 0, 0, 1 << 16),
    "counts": Shape(syscall.PERCPU_ARRAY, 4, 8, max(len(CaptureCount), len(InterceptCount))),
    "scratch": Shape(syscall.PERCPU_ARRAY, 4, abi.SCRATCH_BYTES),
    "settings": Shape(syscall.ARRAY, 4, abi.SETTINGS.size),
    "heartbeat": Shape(syscall.ARRAY, 4, 8, flags=syscall.MMAPABLE),
    # capture.c
    "service_ports": Shape(syscall.ARRAY, 4, 4, _PORTS),
    "services": Shape(syscall.HASH, abi.ENDPOINT.size, 4),
    "local_addresses": Shape(syscall.HASH, _ADDRESS, 1, LOCAL_ADDRESSES),
    "handshakes": Shape(syscall.LRU_HASH, KEY.size, 8, HANDSHAKES),
    # intercept.c
    "servers": Shape(syscall.HASH, abi.ENDPOINT.size, 4),
    "ours": Shape(syscall.HASH, KEY.size, 1, flags=syscall.NO_PREALLOC),
    "claims": Shape(syscall.LPM_TRIE, abi.CLAIM_KEY.size, 4, CLAIMS, syscall.NO_PREALLOC),
    "claims_default": Shape(syscall.ARRAY, 4, 4),
    "relays": Shape(syscall.ARRAY, 4, abi.RELAY_ENTRY.size, abi.RELAYS),
    "relay_work": Shape(syscall.PERCPU_ARRAY, 4, abi.RELAY_WORK_BYTES),
    # progress.c
    "intercepts": Shape(syscall.HASH, abi.ENDPOINT.size, 4),
    "cookie": Shape(syscall.ARRAY, 4, 8),
    "probes": Shape(syscall.ARRAY, 4, 8),
    # The kernel's sessions: pycopy/fastpath/maps.py makes them.
    "sessions": Shape(syscall.ARRAY, 4, abi.SESSION_BYTES, lock_first=True),
    "flows": Shape(syscall.HASH, KEY.size, abi.FLOW.size, flags=syscall.NO_PREALLOC),
    "targets": Shape(syscall.HASH, KEY.size, abi.FLOW.size, flags=syscall.NO_PREALLOC),
    "ended": Shape(syscall.LRU_HASH, KEY.size, 4),
    "slots": Shape(syscall.STACK, 0, 4),
    "lingering": Shape(syscall.QUEUE, 0, abi.LINGERING.size),
    "pending": Shape(syscall.ARRAY, 4, abi.PENDING_SLOTS),
    "log": Shape(
        syscall.ARRAY, 4, 0, flags=syscall.MMAPABLE
    ),  # its values as large as there is room
    "hops": Shape(syscall.ARRAY, 4, abi.HOP.size),
    "config": Shape(syscall.ARRAY, 4, abi.FAST_CONFIG.size),
    "fast_counts": Shape(syscall.PERCPU_ARRAY, 4, 8 * abi.FAST_COUNTS),
    "work": Shape(syscall.PERCPU_ARRAY, 4, abi.WORK_BYTES),
    "attention": Shape(syscall.QUEUE, 0, abi.ATTENTION.size),
    "ports": Shape(syscall.ARRAY, 4, 2, _PORTS),
    "next_port": Shape(syscall.ARRAY, 4, 8),
    "pool": Shape(syscall.ARRAY, 4, abi.POOL.size, 2 * (abi.POOL_NETWORKS + 1)),
    "cursors": Shape(syscall.ARRAY, 4, 4, abi.CURSORS),
}

#: ``enum pycopy_map``.
NUMBERS: dict[str, int] = {name: number for number, name in enumerate(SHAPES, 1)}


def make(name: str, entries: int = 0, value_bytes: int = 0, perf: bool = False) -> int:
    """A new map's descriptor; zeros stand for what its shape says. Raises OSError.

    ``perf``: records leave by perf event output, for which "segments" has an entry for each CPU.
    """
    shape = SHAPES[name]
    if perf and name == "segments":
        shape, entries = Shape(syscall.PERF_EVENT_ARRAY, 4, 4), syscall.possible_cpus()
    return syscall.map_create(
        shape.kind, f"pycopy_{name}", shape.key_bytes, value_bytes or shape.value_bytes,
        entries or shape.entries, shape.flags, shape.lock_first,
    )  # fmt: skip
