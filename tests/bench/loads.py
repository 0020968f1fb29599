"""The loads, the program that drives them (load.c), and the two servers they ask.

Only numbers and command lines: what a run of a load is worth is cell.py's business.
"""

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pycopy.errors import HostUnfit, PycopyError
from pycopy.lab.servers import Nginx
from pycopy.lab.topology import CLIENT_ADDRESSES, Lab

SOURCE = Path(__file__).with_name("load.c")
_GRACE_S = 6.0


@dataclass(frozen=True)
class Load:
    """``rate`` is what is measured when the user names none; 0 is back to back."""

    name: str
    about: str
    rate: int
    answer_bytes: int = 1009
    upload_bytes: int = 0
    connections: int = 64
    short: bool = False
    back_to_back_per_s: int = 0  #: requests for each second asked for, when there is no rate

    def requests(self, rate: int, seconds: float) -> int:
        return max(1, round((rate or self.back_to_back_per_s) * seconds))


LOADS = {
    load.name: load
    for load in (
        Load("keepalive", "kept connections, answers of 1 KB", 4000),
        Load("short", "a connection for each request", 2000, connections=4096, short=True),
        Load("answers20k", "kept connections, answers of 20 KB", 2000, answer_bytes=20_011),
        Load("uploads100k", "kept connections, requests of 100 KB", 200, 211, 100_003),
        Load(
            "uploads1m", "4 connections, requests of 1 MB back to back", 0, 211, 1_000_003,
            connections=4, back_to_back_per_s=40,
        ),
    )
}  # fmt: skip


@contextlib.contextmanager
def compiled() -> Iterator[Path]:
    """load.c as a program, for as long as the block lasts."""
    gcc = shutil.which("gcc")
    if gcc is None:
        raise HostUnfit("the load is a C program and needs gcc", "apt-get install gcc libc6-dev")
    with tempfile.TemporaryDirectory(prefix="pycopy-bench-") as folder:
        program = Path(folder) / "load"
        done = subprocess.run(
            [gcc, "-O2", "-o", str(program), str(SOURCE)], capture_output=True, text=True
        )
        if done.returncode:
            raise PycopyError(f"{SOURCE.name} did not compile:\n{done.stderr}")
        yield program


def drive(
    lab: Lab, program: Path, load: Load, rate: int, seconds: float, to: Sequence[tuple[str, int]],
    programs: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run it to its end, towards each server at once; what was printed, of each server.

    ``programs`` share it: one keeps no more than one CPU busy. Nothing is polled meanwhile,
    that would cost CPU.
    """
    part = replace(load, connections=load.connections // programs)
    clients = [
        lab.popen(
            "client", _command(lab, program, part, rate // programs, seconds, role, port),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for role, port in to for _ in range(programs)
    ]  # fmt: skip
    results = []
    for client in clients:
        out, err = client.communicate()  # it has a limit of its own
        try:
            results.append(dict(json.loads(out)))
        except ValueError:
            said = err.decode(errors="replace")[-400:]
            raise PycopyError(f"the load broke off: {said}") from None
    return [_merged(results[at : at + programs]) for at in range(0, len(results), programs)]


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One load that several programs have shared: its sums, and the slowest one's times."""
    worst = max(parts, key=lambda part: part["latency_us"]["p99"])
    errors: Counter[str] = Counter()
    for part in parts:
        errors.update(part["errors"])
    sums = {what: sum(part[what] for part in parts) for what in ("requests", "answered", "cpu_s")}
    latest = {what: max(part[what] for part in parts) for what in ("seconds", "behind_s")}
    return {**worst, **sums, **latest, "errors": dict(errors)}


def _command(
    lab: Lab, program: Path, load: Load, rate: int, seconds: float, to: str, port: int
) -> list[str]:
    # With CPUs of its own the service is measured alone: the load waits for no other host.
    first = ["chrt", "-f", "1"] if lab.cpus else []
    return [
        *first, str(program), lab.address(to, 4), str(port), lab.address("client", 4),
        str(CLIENT_ADDRESSES), "short" if load.short else "keep", str(load.connections),
        str(rate), str(load.requests(rate, seconds)), str(load.answer_bytes),
        str(load.upload_bytes), str((seconds if rate else 4 * seconds) + _GRACE_S),
    ]  # fmt: skip


#: Of all requests of a load every line is equally long, so that the size of the log is a
#: count. It is written in batches, as on a server that has anything to do. A mirror makes
#: nginx read a request to its last byte before it answers. Without sendfile head and body
#: leave in one write; with it that takes a cork, under which one answer of 20 KB in twenty
#: lay for a tenth of a second.
_CONF = """\
user root;
worker_processes {workers};
worker_rlimit_nofile 65536;
daemon off;
pid {dir}/nginx.pid;
error_log {dir}/error.log;
events {{ worker_connections 32768; }}
http {{
    log_format bench '$arg_n $status $request_length';
    access_log {dir}/access.log bench buffer=64k flush=100ms;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    open_file_cache max=16;
    keepalive_requests 100000000;
    client_max_body_size 16m;
    client_body_buffer_size 2m;
    default_type application/octet-stream;
    server {{
        listen {port} backlog=8192;
        listen [::]:{port} ipv6only=on backlog=8192;
        root {dir}/root;
        location /u/ {{
            alias {dir}/root/b/;
            mirror /nowhere;
            error_page 405 = @taken;
        }}
        location = /nowhere {{ internal; return 204; }}
        location @taken {{ return 200 "{taken}"; }}
    }}
}}
"""


class Service(Nginx):
    """The nginx of :mod:`pycopy.lab.servers`, counted cheaply and reading uploads."""

    def __init__(self, lab: Lab, role: str, port: int, load: Load, workers: int) -> None:
        super().__init__(lab, role, port, (load.answer_bytes,))
        self._load = load
        self.workers = workers

    def _prepare(self) -> None:
        super()._prepare()
        taken = "x" * (self._load.answer_bytes if self._load.upload_bytes else 1)
        (self.dir / "nginx.conf").write_text(
            _CONF.format(dir=self.dir, port=self.port, taken=taken, workers=self.workers)
        )

    def count(self) -> int:
        """Requests in the log, by its size."""
        path = self.dir / "access.log"
        if not path.exists() or not path.stat().st_size:
            return 0
        with path.open("rb") as log:
            width = len(log.readline())
        return path.stat().st_size // width

    def requests(self) -> Counter[bytes]:
        """Each by its number, outcome and length."""
        path = self.dir / "access.log"
        return Counter(path.read_bytes().splitlines()) if path.exists() else Counter()
