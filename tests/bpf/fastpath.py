"""The programs of the fast path, loaded once and run on test packets, with a wire to send to.

What they send (bpf_clone_redirect) leaves through one end of a veth pair and is read from a
packet socket at the other; what they leave to user space is in ``captured`` and ``responses``.
"""

import itertools
import select
import socket
import time

from pycopy.fastpath.kernel import KernelSessions
from pycopy.kernel import abi, syscall
from pycopy.session.leaving import Leaving
from pycopy.wire.segment import KEY
from tests.bpf.harness import Capture, Intercept, sh
from tests.sessions.runner import Failed

SLOTS = 32
ETH_P_ALL = 3

OURS_L2 = bytes(range(62, 74))


class Programs:
    """Everything loaded once, in a network namespace of the caller's with a device to send to."""

    def __init__(self):
        sh("ip link add out type veth peer name wire")
        for name in ("out", "wire"):
            sh(f"sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1")
            sh(f"ip link set {name} mtu 9000 up")
        self.ifindex = socket.if_nametoindex("out")
        self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.wire.bind(("wire", 0))
        self.kernel = KernelSessions(2, SLOTS)
        capture = Capture("tc", services=[(None, 8080), (None, 8081)], kernel=self.kernel)
        intercept = Intercept("tc", targets=(), ports=(1, 65535), kernel=self.kernel)
        self.capture, self.captured = capture.module, capture.ring
        self.intercept, self.responses = intercept.module, intercept.ring
        self.taps = capture, intercept
        self.kernel.load(14)
        self.numbers = itertools.count(1)
        self.counts_bytes = 8 * abi.FAST_COUNTS * syscall.possible_cpus()

    def frames(self, number):
        """That many frames off the wire: they are there, or on their way across the device."""
        found = []
        deadline = time.monotonic() + 5
        while len(found) < number:
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self.wire], [], [], left)[0]:
                raise Failed(f"{number} frames were counted as sent, {len(found)} arrived")
            frame = self.wire.recv(1 << 16)
            if frame[:12] == OURS_L2:
                found.append(frame)
        return found

    def slots(self):
        """Take all that are free."""
        free = []
        while (slot := syscall.stack_pop(self.kernel.maps.by_name["slots"].fd, 4)) is not None:
            free.append(slot)
        return free

    def reset(self):
        """Whatever a script that failed has left behind: the next one begins with nothing."""
        self.kernel.set_clock(1 << 60)
        for name in ("targets", "flows", "ended"):
            table = self.kernel.maps.by_name[name]
            while (key := syscall.map_next_key(table.fd, None, KEY.size)) is not None:
                table.delete(key)
        self.kernel.sweep()
        list(self.kernel.on_timer())
        maps = self.kernel.maps.by_name
        while syscall.stack_pop(maps["lingering"].fd, abi.LINGERING.size) is not None:
            pass
        for slot in range(SLOTS):
            maps["sessions"].update(slot.to_bytes(4, "little"), bytes(abi.SESSION_BYTES))
        self.slots()
        self.add_slots([slot.to_bytes(4, "little") for slot in range(SLOTS)])
        self.kernel._leaving, self.kernel._fetched = Leaving(), {}
        self.kernel.maps.by_name["fast_counts"].update(bytes(4), bytes(self.counts_bytes))
        for ring in (self.captured, self.responses):
            list(ring.drain(1 << 20))
        while select.select([self.wire], [], [], 0)[0]:
            self.wire.recv(1 << 16)

    def add_slots(self, slots):
        for slot in slots:
            syscall.stack_push(
                self.kernel.maps.by_name["slots"].fd, [int.from_bytes(slot, "little")]
            )

    def close(self):
        for tap in self.taps:
            tap.close()
        self.kernel.close()
        self.wire.close()
