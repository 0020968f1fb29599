"""Fixtures of the tests that run the BPF programs in the kernel, which takes root."""

import itertools
import os

import pytest

from tests.bpf.harness import Capture, Namespaces, mapped


@pytest.fixture(scope="session", autouse=True)
def _root():
    if os.geteuid() != 0:
        pytest.fail("tests/bpf load programs into the kernel: run them as root", pytrace=False)


@pytest.fixture(scope="module", params=["tc", "xdp"])
def hook(request):
    return request.param


#: Index, address (None: any), port, in the order of -x.
SERVICES = ((None, 80), (mapped("10.0.0.1"), 8080), (mapped("fd00::1"), 8080), (None, 8081))


@pytest.fixture(scope="module")
def capture(hook):
    program = Capture(hook, services=SERVICES)
    yield program
    program.close()


@pytest.fixture(autouse=True)
def _nothing_left(request):
    """Each test of the shared program begins with an empty ring."""
    if "capture" in request.fixturenames:
        request.getfixturevalue("capture").records()


_ports = itertools.count(20000)


@pytest.fixture
def port():
    """A client port that no test used before: a flow of its own."""
    return next(_ports)


@pytest.fixture
def namespaces():
    made = Namespaces()
    yield made
    made.close()
