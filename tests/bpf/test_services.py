"""Services by the thousand: each packet's own index, at the cost of a look into a table."""

import pytest
from scapy.layers.inet import IP

from pycopy.kernel import syscall
from pycopy.kernel.abi import CaptureCount
from tests.bpf.frames import tcp
from tests.bpf.harness import Capture, mapped

FIRST, NUMBER = 20000, 4000


def to(address):
    return IP(src="192.0.2.7", dst=address)


@pytest.fixture(scope="module")
def many(hook):
    """A range of ports at any address, and the same port at many addresses."""
    services = [(None, port) for port in range(FIRST, FIRST + NUMBER)]
    services += [(mapped(f"10.{n >> 8}.{n & 255}.1"), 80) for n in range(1000)]
    program = Capture(hook, services=services)
    yield program
    program.close()


@pytest.mark.parametrize("number", [0, 1, 2047, NUMBER - 1])
def test_a_range_of_ports(many, port, number):
    ((segment, _),) = many.run(tcp(port, FIRST + number, payload=b"x", ip=to("10.9.9.9")))
    assert segment.service == number


@pytest.mark.parametrize("number", [0, 1, 255, 256, 999])
def test_one_port_at_many_addresses(many, port, number):
    address = f"10.{number >> 8}.{number & 255}.1"
    ((segment, _),) = many.run(tcp(port, 80, payload=b"x", ip=to(address)))
    assert segment.service == NUMBER + number


@pytest.mark.parametrize("dport", [1, 79, 81, FIRST - 1, FIRST + NUMBER, 65535])
def test_other_ports_and_addresses_are_nobodys(many, port, dport):
    assert many.fate(tcp(port, dport, payload=b"x", ip=to("10.0.0.1"))) is None
    assert many.fate(tcp(port, 80, payload=b"x", ip=to("10.0.0.2"))) is None


def test_an_address_goes_before_any_address(hook, port):
    """As typed: -x 10.0.0.1:80-...,80-..."""
    program = Capture(hook, services=[(mapped("10.0.0.1"), 80), (None, 80)])
    for address, service in (("10.0.0.1", 0), ("10.0.0.2", 1)):
        ((segment, _),) = program.run(tcp(port, 80, payload=b"x", ip=to(address)))
        assert segment.service == service
    program.close()


def test_the_last_port_and_the_last_service(hook, port):
    program = Capture(hook, services=[(None, number) for number in range(1, 65536)])
    ((segment, _),) = program.run(tcp(port, 65535, payload=b"x", ip=to("10.0.0.2")))
    assert segment.service == 65534
    program.close()


def test_thousands_cost_what_one_does(hook, many, port):
    """Not by the clock: the same program runs the same way, whatever is in its maps."""
    few = Capture(hook, services=[(None, FIRST)])
    frame = tcp(port, FIRST, payload=b"x", ip=to("10.9.9.9"))
    for program in (few, many):
        program.call(frame)
        assert program.changed == {CaptureCount.SELECTED: 1, CaptureCount.CAPTURED: 1}
    infos = [syscall.program_info(program.module.program_fd) for program in (few, many)]
    assert infos[0].verified_instructions == infos[1].verified_instructions
    few.close()
