"""A session of the kernel's (``struct pycopy_session``), field by field, and the engine's.

An engine that runs alone is given what the two executors are given. After each line of a script
every session that the kernel has must stand where the engine's stands. Each field of
:class:`~pycopy.kernel.abi.KernelSession` is compared, or named here with the reason why it is not.
"""

from collections import Counter

from pycopy.kernel.abi import (
    KNOWN_DOUBT,
    KNOWN_FIN,
    KNOWN_IRS,
    KNOWN_NEED,
    KNOWN_OVERLAP,
    KNOWN_SENT,
    KNOWN_TIME,
    KernelSession,
)
from pycopy.session.states import State
from pycopy.session.views import NEVER, NO_POSITION
from pycopy.wire.seq import MASK
from tests.sessions.runner import Failed, Script

#: What the engine has no counterpart of.
KERNELS_OWN = {
    "lock": "of the map's entry",
    "generation": "of the slot",
    "owner": "who has the session: that it is the kernel's is why it is compared",
    "left": "set when it leaves, and left over from then",
    "log_last": "a place in the log; what is there is compared when it leaves, as the flight",
    "held_at": "a place in the log: `held_sent` and the bytes that are sent hang on it",
}

#: The kernel measures one round trip at a time, the engine each of a flight (RFC 6298 3 allows
#: both). So these are compared for as long as a session has never had two segments in flight, and
#: never lost one; what a timer makes of them is compared as long as the times themselves are.
SAMPLED = ("srtt_ns", "rttvar_ns", "rto_ns", "rto_at", "timed_end", "timed_ns")

#: Of a session that is over, what the kernel still answers with. The engine goes on to count what
#: comes late, the kernel only acknowledges it.
STILL_SAID = (
    "state", "family", "service", "online", "target", "options", "iss", "snd_una", "snd_nxt",
    "irs", "rcv_nxt", "rcv_acked", "online_snd_nxt", "held", "rto_at",
)  # fmt: skip

#: The kernel counts its windows in 32 bits and ends growth here, where nothing is limited by them.
_WINDOW_MOST = 1 << 30


class Alone(Script):
    """The engine beside a pair of executors; it captures what a capture without sessions does."""

    def __init__(self, pair, text):
        addresses = pair.client_addr, pair.server, pair.target_addr
        super().__init__(text, pair.family, addresses, pair.now_ns)
        self.pair = pair

    def on_client(self, seg, payload):
        # An acknowledgement that nobody needs is no record.
        if not self.pair.was_idle:
            super().on_client(seg, payload)

    def star_fate(self, name, number):
        """The pair has compared it, which counts what was no record."""


class Comparison:
    """All comparisons of one run."""

    def __init__(self, read_log, lingering):
        """``read_log``: the record at a place in the log (KernelSession.held_at).

        ``lingering``: the engine's sessions that are over, with the time until when they stay.
        """
        self.read_log, self.lingering = read_log, lingering
        self.apart = set()  # sessions whose round trips are no longer measured alike
        self.sent_need = {}  # session: the acknowledgement of its last segment in flight
        self.compared = Counter()  # how often, by field

    def check(self, kernels, engines):
        """Hold each of the kernel's sessions against the engine's, by its key to the target."""
        self.watch(engines.values())
        for kernel in kernels:
            session = engines.get(kernel.target)
            if session is None:
                raise Failed("the engine, alone, has no such session any more")
            found = self.differences(kernel, session)
            if found:
                texts = [f"{name} is {mine}, the engine's {its}" for name, mine, its in found]
                raise Failed("; ".join(texts))

    def watch(self, sessions):
        """Remember what the engine forgets; call it whenever something has happened."""
        for session in sessions:
            flight = session.target.flight
            if len(flight) > 1 or any(chunk.resent for chunk in flight):
                self.apart.add(session)
            if flight and session.online.irs is not None:
                self.sent_need[session] = (session.online.irs + flight[-1].need + 1) & MASK

    def differences(self, kernel, session):
        """[(field, the kernel's value, the engine's)] of one session."""
        expected = self.expected(kernel, session)
        skipped = set(KernelSession._fields) - set(expected) - set(KERNELS_OWN) - set(SAMPLED)
        assert skipped <= UNKNOWN_AT_TIMES, skipped
        sampled = set(SAMPLED) if session in self.apart else set()
        names = set(expected) - sampled
        if kernel.state == State.TIME_WAIT.value:
            names = set(STILL_SAID)
            expected["rto_at"] = self.ends_at(session)
        self.compared.update(names)
        known = KNOWN_TIME if sampled else 0
        got = kernel._replace(
            known=kernel.known & ~known, cwnd=min(kernel.cwnd, _WINDOW_MOST)
        )._asdict()
        expected["known"] &= ~known
        return [(name, got[name], expected[name]) for name in names if got[name] != expected[name]]

    def expected(self, kernel, session):
        online, target = session.online, session.target
        return {
            **self._connection(session),
            **self._online(kernel, session),
            **_numbers(target),
            **_responses(kernel, target),
            **_clocks(session),
            "known": _known(session),
            "held": sum(chunk.records for chunk in online.queue),
            "held_sent": self._held_sent(kernel),
        }

    @staticmethod
    def _connection(session):
        target = session.target
        # Closed, and still there for what comes late: a state of the kernel's own.
        over = session.state is State.CLOSED
        return {
            "state": (State.TIME_WAIT if over else session.state).value,
            "family": session.family, "service": session.service,
            "online": session.key, "target": session.target_key,
            "options": target.options, "mss": target.mss, "smss": target.smss,
            "snd_wscale": target.snd_wscale, "rcv_wscale": target.rcv_wscale, "iss": target.iss,
        }  # fmt: skip

    def _online(self, kernel, session):
        online = session.online
        expected = {
            "online_snd_nxt": (online.iss + online.snd_nxt) & MASK,
            "asked_ns": online.asked_ns,
            "client_rtt_ns": online.rtt_ns,
            "client_ns": session.last_client_ns,
        }
        if kernel.known & KNOWN_IRS and online.irs is not None:
            expected["online_irs"] = online.irs
            expected["online_rcv_nxt"] = (online.irs + online.rcv_nxt) & MASK
            if kernel.known & KNOWN_NEED:
                expected["online_need"] = (online.irs + online.queue_need + 1) & MASK
            if kernel.known & KNOWN_SENT and not online.queue:
                expected["sent_need"] = (online.irs + online.queue_need + 1) & MASK
            elif kernel.known & KNOWN_SENT and session in self.sent_need:
                expected["sent_need"] = self.sent_need[session]
        return expected

    def ends_at(self, session):
        return next((until_ns for until_ns, each in self.lingering if each is session), None)

    def _held_sent(self, kernel):
        """How much of the oldest record has left: it begins at its number."""
        return (kernel.snd_nxt - self.read_log(kernel.held_at).seq) & MASK if kernel.held else 0


#: Fields that mean nothing before something has happened; `known` says whether it has.
UNKNOWN_AT_TIMES = {
    "online_irs", "online_rcv_nxt", "online_need", "sent_need", "asked", "answered", "said_before",
}  # fmt: skip


def _numbers(target):
    return {
        "snd_una": (target.iss + target.snd_una) & MASK,
        "snd_nxt": (target.iss + target.snd_nxt) & MASK,
        "snd_wnd": target.snd_wnd,
        "snd_wl2": (target.iss + target.snd_wl2) & MASK if target.rcv_nxt else 0,
        "cwnd": min(target.cwnd, _WINDOW_MOST),
        "ssthresh": target.ssthresh,
        "srtt_ns": target.srtt_ns, "rttvar_ns": target.rttvar_ns, "rto_ns": target.rto_ns,
    }  # fmt: skip


def _responses(kernel, target):
    expected = {
        "irs": target.irs,
        "rcv_nxt": (target.irs + target.rcv_nxt) & MASK,
        "rcv_acked": (target.irs + target.rcv_acked) & MASK,
        "snd_wl1": (target.irs + target.snd_wl1) & MASK,
        "ts_recent": target.ts_recent,
        "stretch": target.stretch,
        "need_base": target.need_base & MASK,
    }
    if kernel.known & KNOWN_SENT:
        expected["answered"] = (target.irs + target.answered) & MASK
        expected["said_before"] = (target.irs + target.said_before) & MASK
        expected["asked"] = (target.iss + target.asked) & MASK
    return expected


def _clocks(session):
    flight = session.target.flight
    expected = {
        "rto_at": 0 if session.rto_at == NEVER else session.rto_at,
        "ack_at": 0 if session.ack_at == NEVER else session.ack_at,
        "progress_ns": session.progress_ns,
    }
    if flight:
        expected["timed_end"] = (session.target.iss + flight[0].end) & MASK
        expected["timed_ns"] = flight[0].sent_ns
    return expected


def _known(session):
    online, target = session.online, session.target
    bits = {
        KNOWN_IRS: online.irs is not None,
        KNOWN_NEED: online.queue_need >= 0,
        KNOWN_FIN: online.fin_pos != NO_POSITION,
        KNOWN_TIME: bool(target.flight),
        KNOWN_SENT: bool(target.asked),
        KNOWN_OVERLAP: online.overlapping,
        KNOWN_DOUBT: target.doubtful,
    }
    return sum(bit for bit, is_set in bits.items() if is_set)
