"""``sudo python3 -m tests.bench``: rates, losses and costs of replayers, side by side.

For each load and rate every replayer in turn gets a fresh lab and the same open-loop load
(h2load: requests are due whatever the answers do); the order alternates from round to
round, so that a drift of the machine hits all alike. Prints a table and, with --json, the
raw cells. Nothing else should run on the machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from pycopy.lab.copying import wait_settled
from pycopy.lab.servers import Nginx
from pycopy.lab.topology import Lab, require_root

from . import machine, replayers

CONNECTIONS = 64
LOADS = {"keepalive": 1009, "short": 1009, "answers20k": 20011}


@dataclass
class Cell:
    """One replayer under one load at one rate, once."""

    replayer: str
    load: str
    rate: int
    online: int = 0
    target: int = 0
    machine_us: float = 0.0
    replay_us: float = 0.0
    intercept_us: float = 0.0
    resident_kb: int = 0
    balanced: bool | None = None

    @property
    def lost(self) -> int:
        return self.online - self.target


def _h2load(lab: Lab, load: str, rate: int, seconds: int) -> list[str]:
    url = f"http://{lab.address('online', 4)}/b/{LOADS[load]}"
    if load == "short":
        number = rate * seconds
        return ["h2load", "--h1", "-c", str(number), "-n", str(number), "-r", str(rate), url]
    return ["h2load", "--h1", "-c", str(CONNECTIONS), "-D", str(seconds),
            "--rps", f"{rate / CONNECTIONS:.3f}", url]  # fmt: skip


def measure(name: str, load: str, rate: int, seconds: int, options: tuple[str, ...]) -> Cell:
    """Build a lab, run one cell, take everything down."""
    cell = Cell(name, load, rate)
    with (
        Lab("pycopy-bench") as lab,
        Nginx(lab, "online", 80, (LOADS[load],)) as online,
        Nginx(lab, "target", 8080, (LOADS[load],)) as target,
    ):
        # One client address has 28,000 ports and each rests a minute; a second is enough here.
        lab.run("client", ["sysctl", "-q", "-w", "net.ipv4.tcp_tw_reuse=1",
                           "net.ipv4.ip_local_port_range=1024 65000"])  # fmt: skip
        running = replayers.start(name, lab, options)
        before = [sum(map(machine.tree_ns, pids)) for pids in (running.replay, running.intercept)]
        busy = machine.Busy()
        client = lab.popen("client", _h2load(lab, load, rate, seconds),
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
        client.wait(timeout=seconds + 30)
        cell.online = online.count()
        if running.replay:
            wait_settled(target.count, cell.online, 2.0)
        else:
            time.sleep(0.2)
        after = [sum(map(machine.tree_ns, pids)) for pids in (running.replay, running.intercept)]
        served = max(cell.online, 1)
        cell.machine_us = busy.busy_ns() / 1000 / served
        cell.replay_us, cell.intercept_us = (
            (end - begin) / 1000 / served for begin, end in zip(before, after, strict=True)
        )
        if running.replay:
            cell.resident_kb = max(map(machine.resident_kb, running.replay))
        running.stop()
        cell.balanced = running.balanced
        cell.online, cell.target = online.count(), target.count()
    return cell


def _row(cells: list[Cell]) -> str:
    first = cells[0]

    def mid(name: str) -> float:
        return statistics.median(getattr(cell, name) for cell in cells)

    lost = [cell.lost if first.replayer != "none" else 0 for cell in cells]
    balanced = {True: "yes", False: "NO", None: "-"}[
        None if first.balanced is None else all(cell.balanced for cell in cells)
    ]
    return (
        f"{first.load:<11}{first.rate:>7}  {first.replayer:<18}{mid('online'):>9.0f}"
        f"{max(lost):>8}{mid('machine_us'):>10.1f}{mid('replay_us'):>9.1f}"
        f"{mid('intercept_us'):>11.1f}{mid('resident_kb') / 1024:>8.0f}  {balanced}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.bench", description=__doc__)
    parser.add_argument("--replayers", default=",".join(replayers.names()))
    parser.add_argument("--loads", default="keepalive,short")
    parser.add_argument("--rates", default="1000,2000,4000", help="requests per second")
    parser.add_argument("--seconds", type=int, default=5, help="length of one cell")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", help="write the cells to this file")
    parser.add_argument("options", nargs="*", help="more options for pycopy replay, after --")
    given = parser.parse_args()
    require_root()
    names = given.replayers.split(",")
    print(machine.describe())
    print(
        f"{'load':<11}{'rate':>7}  {'replayer':<18}{'online':>9}{'lost':>8}{'machine':>10}"
        f"{'replay':>9}{'intercept':>11}{'MB':>8}  balanced    (CPU: us per request)"
    )
    cells: list[Cell] = []
    for load in given.loads.split(","):
        for rate in map(int, given.rates.split(",")):
            mine: dict[str, list[Cell]] = {name: [] for name in names}
            for turn in range(given.rounds):
                for name in names if turn % 2 == 0 else reversed(names):
                    mine[name].append(
                        measure(name, load, rate, given.seconds, tuple(given.options))
                    )
            for name in names:
                print(_row(mine[name]), flush=True)
                cells += mine[name]
    if given.json:
        document: dict[str, Any] = {
            "machine": machine.describe(),
            "command": sys.argv,
            "cells": [asdict(cell) for cell in cells],
        }
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
