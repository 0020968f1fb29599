"""One cell: one replayer under one load at one rate, once, in a lab built for it alone.

The window of the measurement begins with the load and ends a fixed time after it, so that
every cell pays for the same seconds of the machine's background. Losses are counted when
the replayer has ended.
"""

import contextlib
import math
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycopy.lab.copying import wait_settled
from pycopy.lab.topology import SWITCH, Lab

from . import machine
from .catalogue import Replayer
from .loads import Load, Service, drive
from .replayers import SERVICE_PORT, TARGET_PORT, Running

#: Whom the load is sent to, as adapters say it.
_SERVERS = {
    "online": [("online", SERVICE_PORT)],
    "target": [("target", TARGET_PORT)],
    "both": [("online", SERVICE_PORT), ("target", TARGET_PORT)],
}
#: Of the window, after the last answer: copies still under way are paid for, too.
TAIL_S = 0.5
_SETTLE_S = 2.0
#: After a loss TCP repeats in 0.2 s, doubled each time.
_SETTLE_IMPAIRED_S = 7.0
#: The load was kept when it was done so soon after its last request was due, and by the
#: replayer, when the target was done so soon after that; its log may be a flush late.
_KEPT_SHARE = 0.02
_KEPT_S = 0.05
_FLUSH_S = 0.1
#: How often a search for the highest rate looks whether the target is done.
_LOOK_S = 0.01


@dataclass
class Cell:
    """What came out; CPU in microseconds per request that was due."""

    replayer: str
    kind: str
    load: str
    rate: int
    stage: str
    round: int = 0
    loss_percent: float = 0.0
    requests: int = 0
    answered: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    behind_s: float = 0.0  #: from when the last request was due to the last answer
    #: From then until all were in the target's log, or none came any more.
    copies_behind_s: float = 0.0
    seconds: float = 0.0  #: of the load
    window_s: float = 0.0
    online: int = 0
    target: int = 0
    lost: int = 0
    surplus: int = 0
    balanced: bool | None = None
    machine_us: float = 0.0  #: the whole machine, with load and servers
    idle_share: float = 0.0  #: of the machine
    stolen_us: float = 0.0
    replay_us: float = 0.0
    intercept_us: float = 0.0
    bpf_us: float = 0.0
    bpf_runs: float = 0.0
    bpf_programs: list[str] = field(default_factory=list)
    load_us: float = 0.0
    online_us: float = 0.0
    target_us: float = 0.0
    p50_us: float = 0.0
    p99_us: float = 0.0
    late_p99_us: float = 0.0  #: of the load itself: requests that left after they were due
    replay_peak_kb: int = 0
    intercept_peak_kb: int = 0
    kernel_segments: int | None = None
    user_segments: int | None = None
    left: dict[str, int] = field(default_factory=dict)  #: why sessions left the kernel
    fates: dict[str, int] = field(default_factory=dict)  #: of the ledger: dropped, refused, lost
    injected: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def own_us(self) -> float:
        """All processes of the replayer, and its BPF programs."""
        return self.replay_us + self.intercept_us + self.bpf_us

    @property
    def kernel_share(self) -> float | None:
        """Of the segments that never reached user space; None where nobody counted."""
        if self.kernel_segments is None or self.user_segments is None:
            return None
        return self.kernel_segments / max(1, self.kernel_segments + self.user_segments)

    @property
    def kept(self) -> bool:
        """The servers and the load kept up with the rate."""
        return self.answered == self.requests and self.behind_s <= self._late_s

    @property
    def copies_kept(self) -> bool:
        """So did the replayer: what it does later it could not go on doing."""
        return self.copies_behind_s <= self._late_s + _FLUSH_S

    @property
    def _late_s(self) -> float:
        return max(_KEPT_S, _KEPT_SHARE * self.requests / self.rate) if self.rate else math.inf

    @property
    def good(self) -> bool:
        """Nothing was lost, nothing invented, all is accounted for."""
        clean = not self.lost and not self.surplus and not self.problems
        return clean and self.balanced is not False


@dataclass(frozen=True)
class Bench:
    """What all cells of a run have in common."""

    program: Path
    seconds: float
    statistics: bool = True
    #: Of each role of the lab; empty: all roles share all of them.
    cpus: Mapping[str, Collection[int]] = field(default_factory=dict)

    def measure(
        self, replayer: Replayer, load: Load, rate: int, stage: str,
        number: int = 0, loss_percent: float = 0.0,
    ) -> Cell:  # fmt: skip
        """Build a lab, run one cell, take everything down."""
        cell = Cell(replayer.name, replayer.kind, load.name, rate, stage, number, loss_percent)
        # One, unless that were what a search for the highest rate finds.
        workers = (os.cpu_count() or 1) if stage == "ceiling" and not self.cpus else 1
        with (
            # A dropped super-segment would be dozens of lost ones.
            Lab(f"pycopy-bench-{os.getpid()}", offloads=not loss_percent, cpus=self.cpus) as lab,
            Service(lab, "online", SERVICE_PORT, load, workers) as online,
            Service(lab, "target", TARGET_PORT, load, workers) as target,
            Running(replayer, lab) as running,
            contextlib.closing(machine.Programs(running.pids())) as programs,
            _impaired(lab, loss_percent, cell),
        ):
            with machine.run_statistics(self.statistics):
                self._window(cell, replayer, lab, load, online, target, running, programs)
            if running.pids():
                patience_s = _SETTLE_IMPAIRED_S if loss_percent else _SETTLE_S
                wait_settled(target.count, online.count(), patience_s)
            running.stop()
            _account(cell, running, online, target)
        return cell

    def _window(
        self, cell: Cell, replayer: Replayer, lab: Lab, load: Load, online: Service,
        target: Service, running: Running, programs: machine.Programs,
    ) -> None:  # fmt: skip
        parts = {
            "replay_us": running.pids("replay"),
            "intercept_us": running.pids("intercept"),
            "online_us": [online.pid],
            "target_us": [target.pid],
        }
        ran = programs.ran()
        spent = {name: machine.trees_ns(pids) for name, pids in parts.items()}
        before = machine.Moment.now()
        to = _SERVERS[replayer.adapter.load_to]
        # As many as the servers have workers: neither alone may be the limit.
        results = drive(lab, self.program, load, cell.rate, self.seconds, to, online.workers)
        if cell.stage == "ceiling" and cell.kind not in ("baseline", "floor"):
            done_s = time.monotonic()
            wait_settled(target.count, results[0]["answered"], _SETTLE_S, _LOOK_S)
            cell.copies_behind_s = time.monotonic() - done_s
        time.sleep(TAIL_S)
        after = machine.Moment.now()
        cell.requests = results[0]["requests"]
        for name, pids in parts.items():
            setattr(cell, name, (machine.trees_ns(pids) - spent[name]) / 1e3 / cell.requests)
        run_ns, runs = (end - begin for end, begin in zip(programs.ran(), ran, strict=True))
        cell.bpf_us, cell.bpf_runs = run_ns / 1e3 / cell.requests, runs / cell.requests
        cell.bpf_programs = programs.names()
        cell.machine_us = after.busy_ns_since(before) / 1e3 / cell.requests
        cell.idle_share = after.idle_share_since(before)
        cell.stolen_us = (after.stolen_s - before.stolen_s) * 1e6 / cell.requests
        cell.window_s = after.wall_s - before.wall_s
        cell.load_us = sum(one["cpu_s"] for one in results) * 1e6 / cell.requests
        cell.replay_peak_kb = machine.peak_kb(parts["replay_us"])
        cell.intercept_peak_kb = machine.peak_kb(parts["intercept_us"])
        _take_results(cell, results)


def _take_results(cell: Cell, results: list[dict[str, Any]]) -> None:
    """Of two loads at once the slower one counts, and the first one's latencies."""
    cell.answered = min(one["answered"] for one in results)
    cell.behind_s = max(one["behind_s"] for one in results)
    first = results[0]
    cell.errors = {name: count for name, count in first["errors"].items() if count}
    cell.seconds = first["seconds"]
    cell.p50_us, cell.p99_us = first["latency_us"]["p50"], first["latency_us"]["p99"]
    cell.late_p99_us = first["late_us"]["p99"]


def _account(cell: Cell, running: Running, online: Service, target: Service) -> None:
    cell.online, cell.target = online.count(), target.count()
    if cell.kind == "floor":
        cell.lost = cell.requests - cell.answered
    elif cell.kind != "baseline":
        asked, copied = online.requests(), target.requests()
        cell.lost, cell.surplus = (asked - copied).total(), (copied - asked).total()
    cell.balanced, cell.problems = running.balanced, running.problems
    sections = [ledger.get("ledger", ledger).get("fastpath") for ledger in running.ledgers]
    for ledger in running.ledgers:
        for name, count in ledger.get("ledger", {}).get("segments", {}).items():
            if count and name.startswith(("dropped_", "refused_", "lost_")):
                cell.fates[name] = cell.fates.get(name, 0) + count
    for section in sections:
        if section and section.get("state", "on") not in ("on", "off: --no-fastpath"):
            cell.problems.append(f"fast path {section['state']}")
    counts = [section for section in sections if section and "kernel_segments" in section]
    if counts:
        cell.kernel_segments = sum(section["kernel_segments"] for section in counts)
        cell.user_segments = sum(section["user_segments"] for section in counts)
    for section in counts:
        for name, count in section.items():
            if name.startswith("left_"):
                cell.left[name] = cell.left.get(name, 0) + count


@contextlib.contextmanager
def _impaired(lab: Lab, percent: float, cell: Cell) -> Any:
    """Lose so many of the segments that go to the target."""
    if not percent:
        yield
        return
    from tests.lab.impair import PER_MILLION, Impairment  # compiles, which takes memory

    drop_ppm = round(percent / 100 * PER_MILLION)
    with Impairment(
        lab, SWITCH, "target", destination_port=TARGET_PORT, drop_ppm=drop_ppm
    ) as impairment:
        yield
        cell.injected = impairment.counts()
