"""Servers on the lab's hosts, and what they were asked for: real nginx.

Each server writes a log that is not buffered. :class:`Served` is that log as multisets, so
that "the target was asked exactly what the online server was asked" is one comparison.

Tests: tests/unit/test_lab.py, tests/lab/test_lab.py
"""

import os
import shutil
import signal
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pycopy.errors import HostUnfit, PycopyError

from .content import content
from .topology import Lab

READY_S = 15.0

_NGINX_CONF = """\
user root;
worker_processes 1;
daemon off;
pid {dir}/nginx.pid;
error_log {dir}/error.log;
events {{ worker_connections 8192; }}
http {{
    log_format lab '$connection $status $request_length $request';
    access_log {dir}/access.log lab;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    keepalive_timeout 75;
    default_type application/octet-stream;
    server {{
        listen {port} backlog=8192;
        listen [::]:{port} ipv6only=on backlog=8192;
        root {dir}/root;
    }}
}}
"""


@dataclass
class Served:
    """What a server was asked: requests by text and outcome, connections by their requests."""

    requests: Counter[str] = field(default_factory=Counter)
    connections: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """Requests in all."""
        return self.requests.total()

    def lost(self, copy: "Served") -> Counter[str]:
        """What was served here and never arrived at ``copy``."""
        return self.requests - copy.requests

    def surplus(self, copy: "Served") -> Counter[str]:
        """What ``copy`` was asked and nobody had asked here: duplicates, broken requests."""
        return copy.requests - self.requests

    def matching(self, text: str) -> "Served":
        """Only what mentions ``text``, such as the ids of one run."""
        return Served(
            Counter({key: count for key, count in self.requests.items() if text in key}),
            Counter({key: count for key, count in self.connections.items() if text in key}),
        )

    @staticmethod
    def sum(parts: Iterable["Served"]) -> "Served":
        """What several servers, or one server in several runs, were asked together."""
        total = Served()
        for part in parts:
            total.requests.update(part.requests)
            total.connections.update(part.connections)
        return total


class Server:
    """A server process on one host of the lab, with a directory of its own."""

    command: list[str]

    def __init__(self, lab: Lab, role: str, port: int) -> None:
        self.lab = lab
        self.role = role
        self.port = port
        self.dir = lab.state_dir / f"{type(self).__name__.lower()}-{role}-{port}"
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id; only while it runs."""
        assert self._child is not None
        return self._child.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it in a new directory and wait until both families listen; raises PycopyError."""
        shutil.rmtree(self.dir, ignore_errors=True)  # an earlier server's log
        self.dir.mkdir(parents=True)
        self._prepare()
        with (self.dir / "output").open("wb") as output:
            self._child = self.lab.popen(
                self.role, self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        deadline = time.monotonic() + READY_S
        while not self._listens():
            if self._child.poll() is not None or time.monotonic() > deadline:
                said = (self.dir / "output").read_text(errors="replace").strip()
                raise PycopyError(f"{type(self).__name__} on {self.role} did not start: {said}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End it, by SIGKILL if SIGTERM does not within 10 s; may be called twice."""
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._child = None

    def _listens(self) -> bool:
        """Both families listen; read from the kernel, so that no connection is logged."""
        wanted = f":{self.port:04X} "
        with self.lab.inside(self.role):
            return all(
                any(
                    wanted in line and line.split()[3] == "0A"
                    for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()
                )
                for table in ("tcp", "tcp6")
            )

    def forget(self) -> None:
        """Begin an empty log: what was served so far is not counted any more."""
        os.truncate(self.dir / "access.log", 0)

    def served(self) -> Served:
        """What its log has: everything it was asked since :meth:`start` or :meth:`forget`."""
        raise NotImplementedError

    def count(self) -> int:
        """Requests served so far, cheaply: used to wait for the last one."""
        raise NotImplementedError

    def _prepare(self) -> None:
        raise NotImplementedError


class Nginx(Server):
    """Real nginx, one worker, serving ``/b/N`` for every N of ``sizes``."""

    def __init__(self, lab: Lab, role: str, port: int, sizes: Iterable[int] = (1, 1009)) -> None:
        super().__init__(lab, role, port)
        self._sizes = tuple(sizes)
        self.command = [nginx_binary(), "-p", str(self.dir), "-c", str(self.dir / "nginx.conf")]
        self.command += ["-e", str(self.dir / "error.log")]

    def _prepare(self) -> None:
        root = self.dir / "root" / "b"
        root.mkdir(parents=True, exist_ok=True)
        for size_bytes in self._sizes:
            (root / str(size_bytes)).write_bytes(content(size_bytes))
        (self.dir / "nginx.conf").write_text(_NGINX_CONF.format(dir=self.dir, port=self.port))

    def served(self) -> Served:
        """Requests as ``status length request``, from nginx's access log."""
        served = Served()
        by_connection: dict[str, list[str]] = defaultdict(list)
        for line in (self.dir / "access.log").read_text(errors="replace").splitlines():
            connection, _, outcome = line.partition(" ")
            served.requests[outcome] += 1
            by_connection[connection].append(outcome)
        served.connections.update("\n".join(group) for group in by_connection.values())
        return served

    def count(self) -> int:
        """Lines of the access log."""
        return (self.dir / "access.log").read_bytes().count(b"\n")


def nginx_binary() -> str:
    """The path of nginx; HostUnfit, which names the cure, if there is none."""
    found = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if found is None:
        raise HostUnfit("nginx is not installed", "install it: apt-get install nginx-light")
    return found
