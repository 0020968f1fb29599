"""How large the shared maps are, and what programs are told of them."""

import errno

import pytest

from pycopy.errors import PycopyError
from pycopy.fastpath import maps as maps_module
from pycopy.fastpath.maps import LOG_MIN_BYTES, LOG_TOTAL_BYTES, SLOTS_MAX, Maps, log_bytes
from pycopy.kernel import abi, objects, shapes, syscall
from pycopy.kernel.abi import Constant
from pycopy.session.fields import KERNEL_SESSION


@pytest.mark.parametrize("cpus", [1, 2, 3, 7, 8, 31, 32, 33, 128, 1024])
def test_each_cpus_log_is_a_power_of_two_of_its_share(cpus):
    size = log_bytes(cpus)
    assert size & size - 1 == 0 and size >= LOG_MIN_BYTES
    assert size * cpus <= max(LOG_TOTAL_BYTES, LOG_MIN_BYTES * cpus)
    assert 2 * size * cpus > LOG_TOTAL_BYTES


def test_one_payload_and_its_record_always_fit():
    assert 4 * (abi.LOG_PAYLOAD + abi.LOG_RECORD.size) <= LOG_MIN_BYTES
    assert LOG_MIN_BYTES < 1 << abi.LOG_CPU_SHIFT


@pytest.fixture
def few(root):
    made = Maps(3, 100)
    yield made
    made.close()


def test_sizes(few):
    sizes = {name: each.max_entries for name, each in few.by_name.items()}
    assert few.slots == sizes["sessions"] == sizes["slots"] == 100
    assert sizes["flows"] > 200 + maps_module.DISOWNED_MAX and sizes["targets"] == 300
    assert sizes["pending"] == 2  # of 64 sessions each
    assert sizes["hops"] == sizes["next_port"] == 3
    assert sizes["log"] == few.cpus == syscall.possible_cpus()
    assert len(few.log) >= few.log_at(few.cpus - 1) + few.log_value_bytes
    values = {name: each.value_bytes for name, each in few.by_name.items()}
    assert values["sessions"] == KERNEL_SESSION.size
    assert values["fast_counts"] == 8 * abi.FAST_COUNTS


def test_programs_are_told_of_every_map(few):
    told = few.constants
    assert told[Constant.SLOTS] == 100 and told[Constant.LOG_MASK] == few.log_bytes - 1
    assert dict(few.given) == {name: each.fd for name, each in few.by_name.items()}
    # All that the programs of the fast path use, but for what each has of its own.
    used = objects.map_numbers(objects.find("fastpath-tc-ether-fast").programs.values())
    assert {shapes.NUMBERS[name] for name in few.given} >= used - {shapes.NUMBERS["cursors"]}


def test_slots_are_bounded(root, monkeypatch):
    monkeypatch.setattr(maps_module, "SLOTS_MAX", 64)
    made = Maps(1, 1000)
    assert made.slots == 64 and made.by_name["pending"].max_entries == 1
    assert made.by_name["flows"].max_entries == 1065 + maps_module.DISOWNED_MAX
    made.close()
    assert SLOTS_MAX == 1 << 16


def test_closing_twice_is_no_harm(few):
    few.close()
    assert not few.given
    few.close()


def test_a_kernel_that_has_only_small_values_gets_smaller_logs(root, monkeypatch):
    """Linux 5.10 has none above 4 MB, and says E2BIG."""

    def old(name, entries=0, value_bytes=0, perf=False):
        if value_bytes > 4 << 20:
            raise OSError(errno.E2BIG, "Argument list too long")
        return make(name, entries, value_bytes, perf)

    make = shapes.make
    monkeypatch.setattr(shapes, "make", old)
    made = Maps(1, 100)
    assert made.log_bytes == 2 << 20 and made.constants[Constant.LOG_MASK] == (2 << 20) - 1
    assert made.by_name["log"].value_bytes == made.log_value_bytes < 4 << 20
    made.close()


def test_a_kernel_that_takes_no_log_at_all_is_refused(root, monkeypatch):
    def full(name, *_, **__):
        if name == "log":
            raise OSError(errno.E2BIG, "Argument list too long")
        return make(name, *_, **__)

    make = shapes.make
    monkeypatch.setattr(shapes, "make", full)
    with pytest.raises(PycopyError, match="no memory for the map log"):
        Maps(1, 100)
