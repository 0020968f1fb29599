"""The configurations."""

import pytest

from pycopy.command import config


@pytest.mark.parametrize(
    ("memory_gb", "workers", "ring_mb"), [(0.25, 1, 4), (1, 1, 16), (7, 1, 64), (512, 1, 128),
                                          (512, 30, 4), (0.25, 64, 1)],
)  # fmt: skip
def test_rings_by_the_host_s_memory(monkeypatch, memory_gb, workers, ring_mb):
    has = {"SC_PHYS_PAGES": int(memory_gb * 2**18), "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(config.os, "sysconf", has.get)
    assert config.default_ring_bytes(workers) == ring_mb << 20
