"""From the session engine's outbox to the wire: next hop, headers, AF_PACKET.

A frame that cannot be sent is counted by the reason and forgotten: to the session it is a
lost segment, and TCP knows what to do about those. One that is too big for the device it
would only repeat: that session is told the new size.

Tests: tests/lab/test_sender_nexthop.py, tests/lab/test_path_mtu.py
"""

import errno
import time

from pycopy.egress.sender import Sender
from pycopy.host.nexthop import Hop, NextHops
from pycopy.report.ledger import Ledger
from pycopy.session import rewrite
from pycopy.session.connection import Connection, Emission
from pycopy.session.fates import Count
from pycopy.wire import headers
from pycopy.wire.address import family_of
from pycopy.wire.segment import FIN, KEY, RST, SYN

NO_NEXT_HOP = "NO_NEXT_HOP"


class Egress:
    """Sends emissions. ``mtu`` (0: the route's) bounds what one frame carries."""

    def __init__(self, hops: NextHops, ledger: Ledger, mtu: int) -> None:
        self._hops = hops
        self._ledger = ledger
        self._mtu = mtu
        self._sender = Sender()
        self._header = bytearray(headers.HEADER_BYTES_MAX)
        self._view = memoryview(self._header)
        self._too_big: list[Connection] = []

    def prepare(self, hop: Hop) -> None:
        """Open the socket for ``hop`` now, so that an unfit host shows at start-up."""
        self._sender.open(hop)

    def path_mss(self, target_addr: bytes) -> int:
        """Largest TCP payload of one frame to ``target_addr``, options not counted."""
        hop = self._hops.resolve(target_addr)
        mtu = self._mtu or hop.mtu or 1500
        return mtu - (40 if family_of(target_addr) == 4 else 60)

    def drop(self, outbox: list[Emission], reason: str) -> None:
        """Count all of ``outbox`` as not sent, and empty it."""
        errors = self._ledger.send_errors
        errors[reason] = errors.get(reason, 0) + len(outbox)
        outbox.clear()

    def flush(self, outbox: list[Emission]) -> None:
        """Send and empty ``outbox``."""
        counts, errors = self._ledger.counts, self._ledger.send_errors
        self._sender.begin()
        header, view, send, own_mtu = self._header, self._view, self._sender.send, self._mtu
        for emission in outbox:
            session, flags, data = emission[0], emission[1], emission[5]
            hop = session.hop or self._introduce(session)
            if not hop.usable:
                errors[NO_NEXT_HOP] = errors.get(NO_NEXT_HOP, 0) + 1
                continue
            size = rewrite.write(header, emission, session.flow, hop.l2, own_mtu or hop.mtu)
            error = send(hop, view[:size], data)
            if error:
                name = errno.errorcode.get(error, str(error))
                errors[name] = errors.get(name, 0) + 1
                if error == errno.EMSGSIZE:
                    self._too_big.append(session)
                continue
            counts[Count.SENT_SEGMENTS] += 1
            if data:
                counts[Count.SENT_PAYLOAD] += 1
            elif not flags & (FIN | SYN | RST):
                counts[Count.SENT_ACK] += 1
            if flags & (FIN | SYN | RST):
                self._count_flags(flags)
        outbox.clear()
        if self._too_big:
            self._cut_smaller(outbox)

    def _cut_smaller(self, outbox: list[Emission]) -> None:
        """A device's MTU was lowered and we have not heard of it yet: look, and send again."""
        sessions, self._too_big = dict.fromkeys(self._too_big), []
        now_ns = time.monotonic_ns()
        self._hops.look_at_all()
        for session in sessions:
            if session.hop is not None:
                session.lower_mtu(session.hop.mtu, now_ns)
        if outbox:  # less each time, or it stays empty
            self.flush(outbox)

    def _count_flags(self, flags: int) -> None:
        counts = self._ledger.counts
        for flag, count in ((SYN, Count.SENT_SYN), (FIN, Count.SENT_FIN), (RST, Count.SENT_RST)):
            if flags & flag:
                counts[count] += 1

    def _introduce(self, session: Connection) -> Hop:
        """First frame of a session: its next hop and the constant half of its headers."""
        source, target, source_port, target_port = KEY.unpack(session.target_key)
        session.hop = hop = self._hops.resolve(target)
        session.flow = headers.Flow(session.family, source, target, source_port, target_port)
        return hop

    def close(self) -> None:
        """Close the packet sockets."""
        self._sender.close()
