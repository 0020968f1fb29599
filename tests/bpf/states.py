"""A session of the kernel's (``struct pycopy_session``), field by field, and the engine's.

An engine that runs alone is given what the two executors are given. After each line of a script
every session that the kernel has must stand where the engine's stands, and both must have counted
the same. Each field of
:class:`~pycopy.session.fields.KernelSession` is compared, or named here with the reason why it is
not.
"""

from collections import Counter
from operator import attrgetter

from pycopy.session.fates import Count
from pycopy.session.fields import FIELDS, Known, Space
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
SAMPLED = frozenset(field.name for field in FIELDS if field.sampled)

#: Of a session that is over, what the kernel still answers with. The engine goes on to count what
#: comes late, the kernel only acknowledges it.
STILL_SAID = (
    "state", "family", "service", "online", "target", "options", "iss", "snd_una", "snd_nxt",
    "irs", "rcv_nxt", "rcv_acked", "online_snd_nxt", "held", "rto_at",
)  # fmt: skip

#: The kernel counts its windows in 32 bits and ends growth here, where nothing is limited by them.
_WINDOW_MOST = 1 << 30

#: What both executors count. What is sent only the kernel and the sender behind the engine do; a
#: RST leaves the kernel, but for one in TIME_WAIT, which is not counted as such there.
COUNTED = (
    Count.CAPTURED, Count.SYN, Count.PAYLOAD, Count.PAYLOAD_BYTES, Count.RESPONSES,
    Count.RESPONSE_PAYLOAD, Count.RESPONSE_FIN, Count.SESSIONS, Count.ESTABLISHED,
    Count.RELEASED_BY_QUIET,
)  # fmt: skip


def check_counts(ledger, alone):
    """The ledger of both executors says what the engine's says, wherever a session is."""
    for count in COUNTED:
        if ledger.counts[count] != alone.counts[count]:
            raise Failed(f"{count.name} {ledger.counts[count]}, the engine's {alone.counts[count]}")
    if ledger.hold != alone.hold:
        raise Failed(f"hold times {ledger.hold}, the engine's {alone.hold}")


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
        sampled = SAMPLED if session in self.apart else frozenset()
        names = set(expected) - sampled
        if kernel.state == State.TIME_WAIT.value:
            names = set(STILL_SAID)
            expected["rto_at"] = self.ends_at(session)
        self.compared.update(names)
        unknown = Known.TIME if sampled else 0
        got = kernel._replace(
            known=kernel.known & ~unknown, cwnd=min(kernel.cwnd, _WINDOW_MOST)
        )._asdict()
        expected["known"] &= ~unknown
        return [(name, got[name], expected[name]) for name in names if got[name] != expected[name]]

    def expected(self, kernel, session):
        """{field: what the engine says}, of all that mean something now."""
        expected = {}
        for field in FIELDS:
            if field.name in KERNELS_OWN or kernel.known & (field.present or 0) != (
                field.present or 0
            ):
                continue
            if field.at:
                expected[field.name] = translate(field, session)
            else:
                expected[field.name] = getattr(self, f"_{field.name}")(kernel, session)
        return {name: value for name, value in expected.items() if value is not None}

    # -- what the engine has in another way ----------------------------------------------------

    def _state(self, _, session):
        # Closed, and still there for what comes late: a state of the kernel's own.
        over = session.state is State.CLOSED
        return (State.TIME_WAIT if over else session.state).value

    def _known(self, _, session):
        online, target = session.online, session.target
        bits = {
            Known.IRS: online.irs is not None,
            Known.NEED: online.queue_need >= 0,
            Known.FIN: online.fin_pos != NO_POSITION,
            Known.TIME: bool(target.flight),
            Known.SENT: bool(target.asked),
            **{bit: attrgetter(bit.at)(session) for bit in Known if bit.at},
        }
        assert set(bits) == set(Known)
        return sum(bit for bit, is_set in bits.items() if is_set)

    def _iss(self, _, session):
        return session.target.iss

    def _held(self, _, session):
        return sum(chunk.records for chunk in session.online.queue)

    def _held_sent(self, kernel, _):
        """How much of the oldest record has left: it begins at its number."""
        return (kernel.snd_nxt - self.read_log(kernel.held_at).seq) & MASK if kernel.held else 0

    def _online_irs(self, _, session):
        return session.online.irs

    def _online_need(self, _, session):
        return (session.online.irs + session.online.queue_need + 1) & MASK

    def _sent_need(self, _, session):
        online = session.online
        return self.sent_need.get(session) if online.queue else self._online_need(_, session)

    def _need_base(self, _, session):
        return session.target.need_base & MASK

    def _timed_end(self, _, session):
        flight = session.target.flight
        return (session.target.iss + flight[0].end) & MASK if flight else None

    def _timed_ns(self, _, session):
        flight = session.target.flight
        return flight[0].sent_ns if flight else None

    def _rto_at(self, _, session):
        return 0 if session.rto_at == NEVER else session.rto_at

    def ends_at(self, session):
        return next((until_ns for until_ns, each in self.lingering if each is session), None)


def translate(field, session):
    """A field of the engine's, as the declaration says where it is and what it means."""
    value = attrgetter(field.at)(session)
    match field.space:
        case Space.SENT if session.target.rcv_nxt or field.name != "snd_wl2":
            return (session.target.iss + value) & MASK
        case Space.ONLINE:
            return (session.online.irs + value) & MASK
        case Space.TARGET:
            return (session.target.irs + value) & MASK
        case Space.DEADLINE:
            return 0 if value == NEVER else value
        case _:
            return min(value, _WINDOW_MOST) if field.name == "cwnd" else value
