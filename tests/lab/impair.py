"""A bad network between two hosts of the lab: loss, duplicates and reordering, counted.

``impair.c`` decides at TC egress of one interface; what it holds back comes out of a veth
pair here and is sent on a few milliseconds later, after what came behind it. The usual
interface is the switch's port towards the receiving host, where no pycopy program is.
Offloads must be off: one dropped super-segment would be dozens of lost ones.
"""

import contextlib
import heapq
import os
import random
import select
import socket
import struct
import sys
import threading
import time
from pathlib import Path

from pycopy.kernel.attach import Hook, attach
from pycopy.lab.copying import Placement
from pycopy.lab.topology import DEVICE, SWITCH
from tests.bpf.sources import load

SOURCE = Path(__file__).with_name("impair.c")
COUNTS = ("matched", "dropped", "duplicated", "held")
PER_MILLION = 1_000_000
UNLIMITED = 1 << 40
CHANNEL_PORT = 36524

#: struct rule, impair.c
_RULE = struct.Struct("=11I")
_MARK = 0x1ABE1
_ETH_P_ALL = 0x0003
_ZERO = bytes(4)

#: What becomes of what is dropped (linux/pkt_cls.h).
PASS_UNSEEN = 0  # TC_ACT_OK: past all programs behind this one, into the stack
DROP = 2  # TC_ACT_SHOT
DROP_AS_SENT = 7  # TC_ACT_REDIRECT, to nowhere: the sender's TCP must not know

#: Loaded programs that nobody uses: compiling takes longer than most tests.
_idle = []


class Impairment:
    """Impair TCP segments with these ports that leave (or enter) ``device`` of ``role``."""

    def __init__(
        self, lab, role, device=DEVICE, hook=Hook.TC_EGRESS, *, source_port=0,
        destination_port=0, flags=0, payload_bytes=0, drop_ppm=0, duplicate_ppm=0, hold_ppm=0,
        hold_s=0.004, verdict=DROP, skip=0, budget=UNLIMITED, seed=10,
        protocol=socket.IPPROTO_TCP,
    ):  # fmt: skip
        self._module = _idle.pop() if _idle else load(SOURCE)
        maps = self._module.maps
        self._attachment = self._holder = None
        try:
            if hold_ppm:
                self._holder = _Holder(lab, role, device, hold_s)
            maps["rules"].update(_ZERO, _RULE.pack(
                source_port, destination_port, flags, payload_bytes, drop_ppm, duplicate_ppm,
                hold_ppm, self._holder.ifindex if self._holder else 0, verdict, skip, protocol,
            ))  # fmt: skip
            self.allow(budget)
            maps["seen"].update(_ZERO, bytes(8))
            # CPUs draw from sequences of their own; which segment meets which is chance.
            seeds = random.Random(seed)
            cpus = len(maps["random"].lookup(_ZERO)) // 8
            maps["random"].update(_ZERO, seeds.randbytes(8 * cpus))
            for index in range(len(COUNTS)):
                maps["counts"].update(index.to_bytes(4, sys.byteorder), bytes(8 * cpus))
            with lab.inside(role):
                self._attachment = attach(self._module, device, hook)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.close()

    def allow(self, budget):
        """So many more segments may be impaired."""
        self._module.maps["budget"].update(_ZERO, budget.to_bytes(8, sys.byteorder))

    def counts(self):
        """What was done so far, by name."""
        return {
            name: self._module.maps["counts"].sum_percpu(index) for index, name in enumerate(COUNTS)
        }

    def close(self):
        """Make the network good again; twice does nothing."""
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None
        if self._holder is not None:
            self._holder.close()
            self._holder = None
        if self._module is not None:
            self.final = self.counts()
            _idle.append(self._module)
            self._module = None


class _Holder(threading.Thread):
    """Takes what was redirected into one end of a veth pair and sends it on late."""

    _numbers = iter(range(1 << 30))

    def __init__(self, lab, role, device, hold_s):
        super().__init__(daemon=True)
        self._hold_s = hold_s
        self._lab, self._role = lab, role
        number = next(self._numbers)
        self._names = f"hold{number}", f"held{number}"
        lab.run(role, ["ip", "link", "add", self._names[0], "type", "veth",
                       "peer", "name", self._names[1]])  # fmt: skip
        with lab.inside(role):
            for name in self._names:
                Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        for name in self._names:
            lab.run(role, ["ip", "link", "set", name, "up"])
        with lab.inside(role):
            self._take = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            self._give = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._take.bind((self._names[1], _ETH_P_ALL))
            self._give.bind((device, 0))
            self.ifindex = socket.if_nametoindex(self._names[0])
        self._give.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, _MARK)
        self._take.setblocking(False)
        self._wake, self._hang_up = os.pipe()
        self.start()

    def run(self):
        waiting, number = [], 0
        while True:
            wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            ready, _, _ = select.select([self._take, self._wake], [], [], wait_s)
            if self._wake in ready:
                return
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = self._take.recv(65536)
                    number += 1
                    heapq.heappush(waiting, (time.monotonic() + self._hold_s, number, frame))
            while waiting and waiting[0][0] <= time.monotonic():
                self._give.send(heapq.heappop(waiting)[2])

    def close(self):
        os.close(self._hang_up)
        self.join()
        os.close(self._wake)
        self._take.close()
        self._give.close()
        self._lab.run(self._role, ["ip", "link", "del", self._names[0]])


#: From whom to whom. The last one is where a response turns into a record.
LEGS = ("client to online", "replay to target", "target to intercept")


def impair_leg(lab, placement, leg, *, online_port=80, target_port=8080, **what):
    """Impair one leg of a copying; on the target only after pycopy has been started.

    There the intercept sits at the sender's own egress, so the bad network has to be
    squeezed in between: attached later, ours comes first.
    """
    if leg == "client to online":
        return Impairment(lab, SWITCH, "online", destination_port=online_port, **what)
    if leg == "replay to target":
        return Impairment(lab, SWITCH, "target", destination_port=target_port, **what)
    what["source_port"] = target_port
    if placement is Placement.TARGET:
        return Impairment(lab, "target", verdict=DROP_AS_SENT, **what)
    port = "online" if placement is Placement.SELF else "assistant"
    return Impairment(lab, SWITCH, port, **what)


def impair_channel(lab, placement, **what):
    """Both directions of the channel between intercept and replay."""
    return [
        Impairment(lab, SWITCH, "online", source_port=CHANNEL_PORT, **what),
        Impairment(lab, SWITCH, placement.value, destination_port=CHANNEL_PORT, **what),
    ]


def impair_datagrams(lab, **what):
    """What an intercept sends straight to the online host, probes among it."""
    return Impairment(
        lab, SWITCH, "online", source_port=CHANNEL_PORT, protocol=socket.IPPROTO_UDP, **what
    )
