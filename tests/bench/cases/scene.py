"""One case with one replayer: a lab of its own, its servers, and what arrived.

A case is a function that puts servers into a :class:`Scene`, starts the replayer when it
wants it, and drives traffic to its end. :func:`measure` builds the lab around it, waits
for the target to have everything, and takes all of it down whatever happened. What counts
is what the servers say; nothing a replayer says is believed, but pycopy's own balance.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycopy.lab.copying import LoadRun, Placement
from pycopy.lab.servers import Server
from pycopy.lab.topology import Lab
from tests.lab.databases import Database, streams
from tests.lab.exact import Exact
from tests.lab.impair import Impairment, impair_leg

from . import replayers

#: What a server was asked, or holds: so many of each.
Things = Counter[Hashable]

#: /proc/net/tcp: connections that are over for both sides, and no connections.
_OVER = {"06", "07", "0A"}  # TIME_WAIT, CLOSE, LISTEN
_LOOPBACK = ("0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")

#: The target listens on the online server's port + this.
PORT_STEP = 8000


@dataclass(frozen=True)
class Case:
    """``drive`` is called with a scene and returns when the load has ended."""

    name: str
    drive: Callable[["Scene"], None]
    offloads: bool = True
    #: Only pycopy can be put into this situation.
    pycopy_only: bool = False


@dataclass
class Row:
    """What became of one case with one replayer."""

    case: str
    replayer: str
    online: int = 0
    target: int = 0
    lost: int = 0
    surplus: int = 0
    #: From the load's end until the target had everything; None: not within the limit.
    recovered_s: float | None = None
    left_open: int = 0
    balanced: bool | None = None
    #: Segments impaired, by what was done to them.
    impaired: dict[str, int] | None = None
    #: How pycopy's sessions ended.
    sessions: dict[str, int] | None = None
    #: What went wrong beside the figures.
    note: str = ""


class Scene:
    """What a case may use: servers on both hosts, the replayer, a bad network, load."""

    def __init__(self, lab: Lab, replayer: str, options: tuple[str, ...]) -> None:
        self.lab = lab
        self.replayer = replayer
        self.running = replayers.Running()
        self.online: list[Server] = []
        self.target: list[Server] = []
        self.impairments: list[Impairment] = []
        self._options = options

    @property
    def placement(self) -> Placement:
        return replayers.placement(self.replayer)

    def serve(
        self,
        port: int = 80,
        online: Callable[..., Server] = Exact,
        target: Callable[..., Server] | None = None,
    ) -> None:
        """Start a server on the online host and one on the target."""
        for kind, role, servers, step in (
            (online, "online", self.online, 0),
            (target or online, "target", self.target, PORT_STEP),
        ):
            servers.append(kind(self.lab, role, port + step))
            servers[-1].start()

    def start(self) -> None:
        """Start the replayer for every port that is served."""
        ports = [(server.port, server.port + PORT_STEP) for server in self.online]
        self.running = replayers.start(self.replayer, self.lab, self._options, ports)

    def impair(self, leg: str, **what: int) -> None:
        """Make one leg bad, from now to the end; see :mod:`tests.lab.impair`."""
        self.impairments.append(impair_leg(self.lab, self.placement, leg, **what))

    def load(self, requests: int, connections: int, **options: object) -> None:
        """Drive load as in :mod:`pycopy.lab.load`; the clients must be served to the last byte."""
        arguments = ["--requests", str(requests), "--connections", str(connections)]
        for option, value in options.items():
            arguments += [f"--{option.replace('_', '-')}", str(value)]
        result = LoadRun(self.lab, 4, "online", self.online[0].port, *arguments).result()
        if not result["ok"]:
            raise AssertionError(f"clients were not served: {result['errors']}")

    def wait_same(self, timeout_s: float = 5.0) -> None:
        """Wait for the target to hold what the online server holds; not for ever."""
        deadline = time.monotonic() + timeout_s
        while things(self.online) - things(self.target) and time.monotonic() < deadline:
            time.sleep(0.1)

    def left_open(self) -> int:
        """Connections at the target that are not over, by its kernel."""
        ports = {server.port for server in self.target}
        with self.lab.inside("target"):
            return sum(
                int(local.rpartition(":")[2], 16) in ports
                and state not in _OVER
                and remote.rpartition(":")[0] not in _LOOPBACK
                for local, remote, state in _sockets()
            )

    def close(self) -> None:
        """Take everything down, each part even if another one refuses."""
        with contextlib.ExitStack() as stack:
            for server in (*self.online, *self.target):
                stack.callback(server.stop)
            stack.callback(self.running.abandon)
            for impairment in self.impairments:
                stack.callback(impairment.close)


def _sockets() -> Iterator[list[str]]:
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
            yield line.split()[1:4]


def things(servers: Sequence[Server]) -> Things:
    """Everything these servers were asked for; of databases, what they hold."""
    total: Things = Counter()
    for server in servers:
        if isinstance(server, Database):
            total.update(server.rows())
        else:
            requests = server.served().requests.elements()
            total.update(requests if isinstance(server, Exact) else streams(requests))
    return total


def _settle(scene: Scene, row: Row, limit_s: float) -> None:
    """Wait until the target has everything and all sessions are over, or for the limit."""
    began_s = time.monotonic()
    while True:
        asked, copied = things(scene.online), things(scene.target)
        row.left_open = scene.left_open()
        passed_s = time.monotonic() - began_s
        lost = asked - copied
        if row.recovered_s is None and asked and not lost:
            row.recovered_s = round(passed_s, 2)
        if passed_s > limit_s or (row.recovered_s is not None and not row.left_open):
            break
        time.sleep(0.05)
    row.online, row.target = asked.total(), copied.total()
    row.lost, row.surplus = lost.total(), (copied - asked).total()


def measure(
    case: Case, replayer: str, *, limit_s: float, lab_name: str, options: tuple[str, ...] = ()
) -> Row:
    """Build a lab, run ``case`` with ``replayer``, take everything down.

    What goes wrong in the case is a note in the row. What is raised concerns the next case
    as well: an interruption, or a lab that cannot be built or removed.
    """
    row = Row(case.name, replayer)
    notes: list[str] = []
    with Lab(lab_name, offloads=case.offloads) as lab:
        scene = Scene(lab, replayer, options)
        try:
            with _noted(notes):
                case.drive(scene)
            with _noted(notes):
                _settle(scene, row, limit_s)
            notes.append(scene.running.ended())
            with _noted(notes):
                scene.running.stop()
        finally:
            with _noted(notes):
                scene.close()
        row.balanced = scene.running.balanced
        row.sessions = _sessions(scene.running)
        row.impaired = dict(_impaired(scene.impairments)) or None
        if row.impaired and set(row.impaired) == {"matched"}:
            notes.append("chance impaired nothing: so few segments, so low a rate")
    row.note = "; ".join(filter(None, notes))
    return row


@contextlib.contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        notes.append(f"{type(error).__name__}: {str(error)[:400]}")


def _impaired(impairments: Sequence[Impairment]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for impairment in impairments:
        total.update(getattr(impairment, "final", {}))  # it has none when closing failed
    return {what: count for what, count in total.items() if count}


def _sessions(running: replayers.Running) -> dict[str, int] | None:
    """How sessions began and ended, by pycopy's ledger, without what did not happen."""
    if running.outcome is None:
        return None
    counts: dict[str, Any] = running.outcome.replays[0]["ledger"]["sessions"]
    return {name: value for name, value in counts.items() if value}
