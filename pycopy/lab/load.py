"""The lab's clients: a bounded load that checks every byte; ``python -m pycopy.lab.load``.

One epoll loop, no threads: M requests over N connections, either as fast as answers come
with C connections at a time, or at a constant rate whatever the answers do (open loop;
latency then counts from the time a request was due, so that a stall is not hidden).
Prints one JSON object. Stops by itself at the time limit.

Tests: tests/lab/test_lab.py
"""

import argparse
import errno
import gc
import hashlib
import heapq
import ipaddress
import json
import os
import select
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from enum import Enum, auto

from .content import content, http_request, line_request
from .plan import Plan, make_plans

_IP_BIND_ADDRESS_NO_PORT = 24
_READ_BYTES = 256 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

_HEAD_END = {"http": b"\r\n\r\n", "line": b"\r\n"}
_GOOD_HEADS = {"http": (b"HTTP/1.1 200 ",), "line": (b"250 ", b"220 ", b"221 ")}


class _State(Enum):
    CONNECTING = auto()
    GREETING = auto()  # the server speaks first
    IDLE = auto()  # the next request is not due yet
    BUSY = auto()
    QUITTING = auto()  # QUIT sent, its answer awaited
    CLOSING = auto()  # the server's FIN awaited
    DONE = auto()


class _Connection:
    """One client connection working through its plan; checks each answer as it comes."""

    __slots__ = (
        "_expected_bytes", "_head", "_in_head", "_load", "_offset", "_out", "_started_s",
        "digest", "next", "plan", "sock", "state",
    )  # fmt: skip

    def __init__(self, load: "Load", plan: Plan, sock: socket.socket, now_s: float) -> None:
        self._load = load
        self.plan = plan
        self.sock = sock
        self.state = _State.CONNECTING
        self.next = 0
        self.digest = hashlib.sha256()
        self._started_s = now_s
        self._out = memoryview(b"")
        self._head = b""
        self._in_head = True
        self._offset = self._expected_bytes = 0

    def connected(self, now_s: float) -> None:
        if self._load.protocol == "line":
            self.state = _State.GREETING
            self._expected_bytes = 0
            self.readable(now_s)
        else:
            self._begin_next(now_s)

    def _begin_next(self, now_s: float) -> None:
        plan = self.plan
        due_s = self._load.start_s + plan.dues[self.next] if self._load.rate else now_s
        if due_s > now_s:
            self.state = _State.IDLE
            self._load.wait_until(due_s, self)
            return
        self.begin(due_s if self._load.rate else now_s)

    def begin(self, due_s: float) -> None:
        """Send the next request; its latency counts from ``due_s``."""
        if self.next or self._load.rate:
            self._started_s = due_s
        number = self.plan.requests[self.next]
        load = self._load
        upload_bytes = load.uploads[number % len(load.uploads)]
        answer_bytes = load.answers[number % len(load.answers)]
        last = self.next + 1 == len(self.plan.requests)
        if load.protocol == "line":
            request = line_request(f"{load.id}{number}", answer_bytes, upload_bytes)
            self._expected_bytes = 0 if upload_bytes else answer_bytes
        else:
            close = last and self.plan.close == "server"
            request = http_request(f"{load.id}{number}", answer_bytes, upload_bytes, close=close)
            self._expected_bytes = answer_bytes
        load.bytes_out += len(request)
        self.state = _State.BUSY
        self._out = memoryview(request)
        self.writable()

    def writable(self) -> None:
        try:
            while self._out:
                self._out = self._out[self.sock.send(self._out) :]
        except BlockingIOError:
            pass

    def readable(self, now_s: float) -> None:
        """Read until nothing is awaited any more; edge-triggered, so until EAGAIN otherwise."""
        buffer = self._load.buffer
        while self.state not in (_State.IDLE, _State.DONE):
            try:
                count = self.sock.recv_into(buffer)
            except BlockingIOError:
                return
            if not count:
                if self.state is not _State.CLOSING:
                    raise ConnectionError("the server closed early")
                self._finish()
                return
            self._load.bytes_in += count
            self._take(buffer[:count], now_s)

    def _take(self, data: memoryview, now_s: float) -> None:
        if self.state is _State.CLOSING:
            raise ConnectionError("more than the answer came")
        if self._in_head:
            known = len(self._head)
            self._head += data
            end = self._head.find(_HEAD_END[self._load.protocol])
            if end < 0:
                return
            end += len(_HEAD_END[self._load.protocol])
            self._check_head(self._head[:end])
            data = data[end - known :]
            self._head = b""
            self._in_head = False
            self._offset = 0
        upto = self._offset + len(data)
        if upto > self._expected_bytes or data != self._load.pattern[self._offset : upto]:
            raise ConnectionError("the answer is not what was asked for")
        self.digest.update(data)
        self._offset = upto
        if upto == self._expected_bytes:
            self._in_head = True
            self._answered(now_s)

    def _check_head(self, head: bytes) -> None:
        if not head.startswith(_GOOD_HEADS[self._load.protocol]):
            raise ConnectionError(f"answer {head[:40].decode('latin-1')!r}")
        if self._load.protocol == "line":
            announced = int(head.split()[1])
        else:
            begin = head.index(b"Content-Length: ") + 16
            announced = int(head[begin : head.index(b"\r\n", begin)])
            date = head.find(b"\r\nDate: ")
            if date >= 0:
                # The only part of an answer that may differ from one run to the next.
                head = head[:date] + head[head.index(b"\r\n", date + 2) :]
        if announced != self._expected_bytes:
            raise ConnectionError(f"{announced} bytes announced, not {self._expected_bytes}")
        self.digest.update(head)

    def _answered(self, now_s: float) -> None:
        if self.state is _State.GREETING:
            self._begin_next(now_s)
            return
        if self.state is _State.QUITTING:
            self.state = _State.CLOSING
            return
        self._load.answered(time.monotonic() - self._started_s)
        self.next += 1
        if self.next < len(self.plan.requests):
            self._begin_next(now_s)
        elif self.plan.close == "server":
            self.state = _State.CLOSING
            if self._load.protocol == "line":
                self.state = _State.QUITTING
                self._expected_bytes = 0
                self._out = memoryview(line_request("", 0, close=True))
                self.writable()
        else:
            if self.plan.close == "reset":
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._finish()

    def _finish(self) -> None:
        self.state = _State.DONE
        self._load.done(self)


class Load:
    """The whole run; :meth:`run` returns what is printed as JSON."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.protocol: str = options.protocol
        self.answers: list[int] = options.answers
        self.uploads: list[int] = options.uploads
        self.id: str = options.id
        self.rate: float = options.rate
        self.pattern = memoryview(content(max(self.answers)))
        self.buffer = memoryview(bytearray(_READ_BYTES))
        self.start_s = 0.0
        self.bytes_in = self.bytes_out = 0
        self._options = options
        self._server = (options.host, options.port)
        self._family = {4: socket.AF_INET, 6: socket.AF_INET6}[
            ipaddress.ip_address(options.host).version
        ]
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._waiting: list[tuple[float, int, _Connection]] = []
        self._latencies_s: list[float] = []
        self._digests: list[str] = []
        self._errors: Counter[str] = Counter()

    # What connections report.

    def answered(self, latency_s: float) -> None:
        """A request's answer is complete, that long after the request was due."""
        self._latencies_s.append(latency_s)

    def wait_until(self, due_s: float, connection: _Connection) -> None:
        """Wake ``connection`` at ``due_s`` (CLOCK_MONOTONIC) for its next request."""
        heapq.heappush(self._waiting, (due_s, connection.plan.number, connection))

    def done(self, connection: _Connection) -> None:
        """A connection has ended as planned."""
        self._digests.append(connection.digest.hexdigest())
        self._forget(connection)

    def _forget(self, connection: _Connection) -> None:
        self._connections.pop(connection.sock.fileno(), None)
        connection.sock.close()  # leaves the epoll set by itself

    def _failed(self, connection: _Connection, reason: str) -> None:
        connection.state = _State.DONE
        self._errors[reason] += 1
        self._forget(connection)

    # Running.

    def run(self) -> dict[str, object]:
        """Send every request, within the time limit; returns counts, seconds, latencies in us."""
        options = self._options
        plans = deque(
            make_plans(
                options.requests, options.connections, options.short, options.concurrency,
                options.close, options.rate,
            )
        )  # fmt: skip
        gc.collect()
        gc.freeze()
        self.start_s = now_s = time.monotonic()
        limit_s = now_s + options.time_limit
        while (plans or self._connections) and now_s < limit_s:
            while plans and self._may_open(plans[0], now_s):
                self._open(plans.popleft(), now_s)
            wait_s = 0.1
            if self.rate:
                dues = [self._waiting[0][0]] if self._waiting else []
                if plans:
                    dues.append(self.start_s + plans[0].dues[0])
                wait_s = max(0.0, min([due - now_s for due in dues] + [wait_s]))
            if self.rate:
                # epoll rounds up to milliseconds, which would show as latency.
                select.select([self._epoll], [], [], wait_s)
                wait_s = 0.0
            for fd, events in self._epoll.poll(wait_s):
                connection = self._connections.get(fd)
                if connection is not None:
                    self._attempt(connection, self._act, connection, events)
            now_s = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now_s:
                due_s, _, connection = heapq.heappop(self._waiting)
                if connection.state is _State.IDLE:
                    self._attempt(connection, connection.begin, due_s)
        for connection in list(self._connections.values()):
            self._failed(connection, "unfinished at the time limit")
        if plans:
            self._errors["never begun"] += len(plans)
        return self._result(time.monotonic() - self.start_s)

    def _may_open(self, plan: Plan, now_s: float) -> bool:
        if self.rate:
            return self.start_s + plan.dues[0] <= now_s
        return len(self._connections) < int(self._options.concurrency)

    def _open(self, plan: Plan, now_s: float) -> None:
        sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._options.source:
            # The port is chosen at connect(): many connections then share an address.
            sock.setsockopt(socket.SOL_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((self._options.source[plan.number % len(self._options.source)], 0))
        status = sock.connect_ex(self._server)
        connection = _Connection(self, plan, sock, now_s)
        if self.rate:
            connection._started_s = self.start_s + plan.dues[0]
        if status not in (0, errno.EINPROGRESS):
            self._failed(connection, os.strerror(status).lower())
            return
        self._connections[sock.fileno()] = connection
        self._epoll.register(sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def _act(self, connection: _Connection, events: int) -> None:
        now_s = time.monotonic()
        if connection.state is _State.CONNECTING:
            status = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if status:
                raise OSError(status, os.strerror(status))
            if not events & select.EPOLLOUT:
                return
            connection.connected(now_s)
        elif events & select.EPOLLOUT:
            connection.writable()
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            connection.readable(now_s)

    def _attempt(
        self, connection: _Connection, action: Callable[..., None], *arguments: object
    ) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self._failed(connection, (error.strerror or str(error)).lower())

    def _result(self, seconds: float) -> dict[str, object]:
        ordered = sorted(self._latencies_s)

        def microseconds(share: float) -> int:
            return round(ordered[int(share * (len(ordered) - 1))] * 1e6) if ordered else 0

        digest = hashlib.sha256("".join(sorted(self._digests)).encode()).hexdigest()
        return {
            "requests": len(ordered),
            "connections": len(self._digests),
            "errors": dict(self._errors),
            "ok": not self._errors and len(ordered) == self._options.requests,
            "seconds": round(seconds, 3),
            "rate": round(len(ordered) / seconds, 1),
            "latency_us": {name: microseconds(share) for name, share in _SHARES.items()},
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "answers_sha256": digest,
        }


_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The command line of ``python -m pycopy.lab.load``."""
    parser = argparse.ArgumentParser(prog="python -m pycopy.lab.load", description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--requests", type=int, default=1009)
    parser.add_argument("--connections", type=int, default=101)
    parser.add_argument("--short", type=int, default=0, help="connections of one request")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--answers", type=_numbers, default=[1009], help="sizes, in turn")
    parser.add_argument("--uploads", type=_numbers, default=[0], help="sizes, in turn")
    parser.add_argument("--protocol", choices=("http", "line"), default="http")
    parser.add_argument("--close", choices=("server", "client", "reset", "mix"), default="mix")
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s, 0: closed loop")
    parser.add_argument("--source", type=lambda text: text.split(","), default=[])
    parser.add_argument("--id", default="r")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds")
    return parser


def main() -> int:
    """Run one load and print what it measured as JSON; returns 1 if any request failed."""
    result = Load(parser().parse_args()).run()
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
