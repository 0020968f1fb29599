"""The path to the target takes less than was thought: RFC 1191 and 8201, believed as RFC 5927 says.

A router's ICMP message, or the way out of this host itself, lowers the size of a session's
segments. What is in flight and larger is lost for sure, and not by congestion: it is sent
again at once, cut anew, without a word to recovery.py. The size never rises again: a
session is short beside the ten minutes after which a host may try (RFC 1191 6.3).
"""

from pycopy.session import departure
from pycopy.session.connection import Connection
from pycopy.session.fates import Count, ResponseFate
from pycopy.session.rules import MIN_MSS, TIMESTAMPS_BYTES
from pycopy.session.states import State
from pycopy.wire.segment import OPT_TIMESTAMPS, Segment
from pycopy.wire.seq import MASK

#: What no real path falls short of. IPv4: Linux's min_pmtu; IPv6: RFC 8200 5.
MIN_MTU = {4: 552, 6: 1280}

#: IP and TCP without options.
HEADER_BYTES = {4: 40, 6: 60}

#: States in which nothing is sent that could be too big.
_SMALL = frozenset({State.CLOSED, State.SYN_SENT, State.TIME_WAIT})


def on_too_big(session: Connection, seg: Segment, now_ns: int) -> ResponseFate:
    """Take in an ICMP message about a segment of ours; ``seg.seq`` is that segment's."""
    target = session.target
    offset = (seg.seq - target.iss - target.snd_una) & MASK
    in_flight = offset < target.snd_nxt - target.snd_una
    if session.state in _SMALL or not in_flight or seg.mss < MIN_MTU[session.family]:
        # RFC 5927 4.1: a message about what is not in flight is late, or forged.
        return ResponseFate.UNACCEPTABLE
    if not lower(session, seg.mss, now_ns):
        return ResponseFate.DUPLICATE  # one for each segment that was too big
    return ResponseFate.STEERED


def lower(session: Connection, mtu: int, now_ns: int) -> bool:
    """The path takes ``mtu`` bytes; False if that is no news.

    The congestion window is not asked: what is sent again has left the path.
    """
    target = session.target
    mss = max(mtu - HEADER_BYTES[session.family], MIN_MSS)
    if mss >= target.mss:
        return False
    session.host.ledger.counts[Count.PATH_MTU] += 1
    target.mss = mss
    target.smss = mss - TIMESTAMPS_BYTES if target.options & OPT_TIMESTAMPS else mss
    repeated = False
    for chunk in target.flight:
        if len(chunk.data) > target.smss:
            departure.repeat(session, chunk, now_ns)
            repeated = True
    if repeated:
        session.rto_at = now_ns + target.rto_ns
    return True
