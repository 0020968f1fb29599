"""The epoll loop: who is called, and when."""

import os

import pytest

from pycopy.process.loop import NEVER_NS, READ, Loop


@pytest.fixture
def pipe():
    read_fd, write_fd = os.pipe()
    yield read_fd, write_fd
    os.close(read_fd)
    os.close(write_fd)


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


def test_again_does_not_wait_for_what_is_not_ready(loop, pipe):
    called = []
    loop.add(pipe[0], READ, called.append)
    loop.again(pipe[0])
    loop.wait(NEVER_NS)
    assert called == [READ]
    loop.wait(0)
    assert called == [READ]


def test_again_and_ready_is_one_call(loop, pipe):
    called = []
    loop.add(pipe[0], READ, called.append)
    os.write(pipe[1], b"x")
    loop.again(pipe[0])
    loop.wait(NEVER_NS)
    assert called == [READ]


def test_a_callback_may_ask_for_itself_again(loop, pipe):
    called = []

    def callback(events):
        called.append(events)
        if len(called) < 3:
            loop.again(pipe[0])

    loop.add(pipe[0], READ, callback)
    loop.again(pipe[0])
    for calls in (1, 2, 3):
        loop.wait(NEVER_NS)
        assert len(called) == calls


def test_what_was_removed_is_not_called_again(loop, pipe):
    loop.add(pipe[0], READ, lambda _: pytest.fail("it is gone"))
    loop.again(pipe[0])
    loop.remove(pipe[0])
    loop.wait(0)
