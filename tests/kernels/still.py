"""What clients and the target see, second by second, of a pycopy that is killed or stopped.

    python3 -P -m tests.kernels.still [self|target] [replay|intercept] [KILL|STOP] [SECONDS] [RATE]

A steady load is copied; at second 3 the process gets its signal, a stopped one goes on 16 s
later. Each line: requests that the online server and the target got within that second,
segments of copies that reached the target, segments from the target's port that reached the
client's device (none, unless nobody swallows them), and what is attached. For kernels below 6.6,
where a process that is killed leaves filters behind, and for any other; in a guest, which is
slow, take a rate of 8:

    python3 -m tests.kernels.guest 6.1 -- python3 -P -m tests.kernels.still self replay STOP 30 8
"""

import contextlib
import signal
import socket
import sys
import time

from pycopy.kernel import attach
from pycopy.lab.copying import Copying, LoadRun, Placement
from pycopy.lab.servers import Nginx
from pycopy.lab.topology import Lab
from tests.kernels.inside import be_patient

HIT_S, HEALED_S = 3, 19
_ETH_P_ALL, _OUTGOING = 3, 4


class Sniffer:
    """Counts IPv4 TCP segments that reach a host's device, by a port at either end."""

    def __init__(self, lab, role, *, source=0, destination=0):
        with lab.inside(role):
            self._socket = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)
            )
            self._socket.bind(("eth0", _ETH_P_ALL))
        self._socket.setblocking(False)
        self._at = (0, source) if source else (2, destination)

    def take(self):
        """How many came since the last time."""
        found = 0
        at, port = self._at
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, (_, _, kind, _, _) = self._socket.recvfrom(128)
                tcp = kind != _OUTGOING and frame[12:14] == b"\x08\x00" and frame[23] == 6
                found += tcp and int.from_bytes(frame[34 + at : 36 + at], "big") == port
        return found


def main(place="self", which="replay", how="KILL", seconds="26", rate="20"):
    be_patient()
    seconds = int(seconds)
    with Lab("pycopy-still") as lab, contextlib.ExitStack() as stack:
        online = stack.enter_context(Nginx(lab, "online", 80, (1009,)))
        target = stack.enter_context(Nginx(lab, "target", 8080, (1009,)))
        copying = stack.enter_context(Copying(lab, Placement(place), 4))
        programs = copying.replays if which == "replay" else copying.intercepts
        stray, copies = (
            Sniffer(lab, "client", source=8080),
            Sniffer(lab, "target", destination=8080),
        )
        load = LoadRun(
            lab, 4, "online", 80, "--requests", str(int(rate) * seconds), "--connections",
            str(2 * seconds), "--short", str(seconds), "--rate", rate, "--answers", "1009",
            "--time-limit", str(4 * seconds + 60),
        )  # fmt: skip
        print(f"{place}: {which} gets SIG{how} at {HIT_S} s", end="")
        print(f", SIGCONT at {HEALED_S} s" if how == "STOP" else "")
        print("second  online  target  to the target  stray to the client  attached")
        _watch(lab, programs[0], how, seconds, online, target, stray, copies)
        load.result(timeout_s=4 * seconds + 60)
        for each in copying.programs:
            print(f"{each.role} said: {each.messages.strip()}")
        for role in ("online", "target"):
            with lab.inside(role):
                removed = attach.detach_leftovers()
                print(f"pycopy detach on {role}: {', '.join(removed) or 'nothing'}")


def _watch(lab, program, how, seconds, online, target, stray, copies):
    before = online.count(), target.count()
    while online.count() == before[0]:  # on a slow machine clients take their time to start
        time.sleep(0.05)
    begun = time.monotonic()
    for second in range(1, seconds + 1):
        time.sleep(max(begun + second - time.monotonic(), 0))
        now = online.count(), target.count()
        attached = 0
        for role in ("online", "target"):
            with lab.inside(role):
                attached += len(attach.attachments())
        print(
            f"{second:6}{now[0] - before[0]:8}{now[1] - before[1]:8}{copies.take():15}"
            f"{stray.take():21}{attached:10}",
            flush=True,
        )
        before = now
        if second == HIT_S:
            program.process.send_signal(getattr(signal, f"SIG{how}"))
        elif second == HEALED_S and how == "STOP":
            program.process.send_signal(signal.SIGCONT)


if __name__ == "__main__":
    main(*sys.argv[1:])
