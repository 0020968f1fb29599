"""The limits and choices that all sessions of a run share, with their defaults.

Tests: tests/sessions/test_scripts.py
"""

from dataclasses import dataclass

MS = 1_000_000
SECOND = 1_000_000_000

#: RFC 9293 3.7.1: what a SYN without the option means (IPv4, IPv6).
DEFAULT_MSS = {4: 536, 6: 1220}

#: Linux's TCP_MIN_MSS. A smaller option is an attack (CVE-2019-11479), and with 40 bytes of
#: options of our own nothing would be left of a segment.
MIN_MSS = 88

#: RFC 7323 2.3.
MAX_WSCALE = 14

#: Bytes that timestamps take of every segment (RFC 7323 appendix A).
TIMESTAMPS_BYTES = 12

#: RFC 6928 2, in segments.
INITIAL_WINDOW = 10

#: RFC 5681 3.1: "arbitrarily high". No window is larger (RFC 7323 2.3).
NO_SSTHRESH = 1 << 30

#: A silence of so many round trips may be the end of a response (release.py).
QUIET_ROUND_TRIPS = 4


@dataclass(slots=True)
class Rules:
    """Times in nanoseconds, sizes in bytes; letters are the command line's."""

    #: -W clears it: do not wait for the target before the next request.
    wait_for_response: bool = True
    #: -O: only connections whose SYN was captured.
    only_full_sessions: bool = False
    #: -r: per cent of clients to copy.
    sample_percent: int = 100
    #: -g: raise the share from 1 % to ``sample_percent``, one point a second.
    ramp: bool = False
    #: Shortest silence of the target after which a shorter response counts as complete.
    quiet_ns: int = 20 * MS
    quiet_max_ns: int = SECOND
    #: How long after its capture a close still waits for the longest silence, where the target
    #: may only pause in its response (release.py): a busy one may be so far behind.
    doubt_max_ns: int = 60 * SECOND
    #: How long a greeting is waited for that the online server gave. What makes a greeting slow
    #: is the look-up of the client's name, and 5 s are what a resolver waits for its server.
    #: A request that leaves too early lies in the target's buffer until the greeting is out.
    greeting_ns: int = 5 * SECOND
    #: RFC 1122 4.2.3.2 allows up to 500 ms.
    delayed_ack_ns: int = 40 * MS
    #: How long bytes missing from the capture are waited for. A client's own
    #: retransmission comes after at least 200 ms and backs off exponentially.
    gap_ns: int = 10 * SECOND
    #: Something waits for a response: ask whether the connection is still there (RFC 9293 3.8.4).
    keepalive_ns: int = 15 * SECOND
    #: -t: something waits for the target and it stays silent.
    response_idle_ns: int = 600 * SECOND
    #: -k: nothing waits and nothing happens.
    idle_ns: int = 720 * SECOND
    #: Long enough to acknowledge a repeated FIN; RFC 9293's 2 MSL would pin ports for minutes.
    time_wait_ns: int = 2 * SECOND
    #: RFC 6298 2.1 and 2.4; the minimum is Linux's, since RTT is a data centre's.
    rto_initial_ns: int = SECOND
    rto_min_ns: int = 200 * MS
    rto_max_ns: int = 60 * SECOND
    syn_retries: int = 5
    retries: int = 8
    #: Held segments and bytes of one session.
    queue_segments: int = 32768
    queue_bytes: int = 64 << 20
    #: The bytes are divided by this while the process is over its memory limit.
    short_of_memory: int = 64
    #: A mid-stream connection that speaks within this time of the start may be in the
    #: middle of a request; later ones were silent before, so a request begins.
    join_quiet_ns: int = 200 * MS
    #: A mid-stream session's SYN, whose options we must choose.
    join_wscale: int = 7
    #: TSvals are milliseconds of our own clock plus this: one clock for all copies, as of
    #: one host, so that a port used again is accepted in the target's TIME_WAIT (RFC 7323 5.8).
    timestamp_origin: int = 0
    #: Sessions at a time.
    max_sessions: int = 100_000
