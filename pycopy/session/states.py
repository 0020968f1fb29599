"""The state machine of a session: RFC 9293 3.3.2 as the active opener sees it, as data.

Everything that affects the state is in this file, and this file affects nothing else.
A session is a TCP client, so LISTEN and SYN_RECEIVED do not exist. What is not here
(queue, timers, windows) is data, not state. ``TRANSITIONS`` is the whole machine; the
diagram in docs/ is drawn from it.
"""

from enum import Enum, auto


class State(Enum):
    """Where the connection to the target stands (RFC 9293 3.3.2)."""

    CLOSED = auto()
    SYN_SENT = auto()
    ESTABLISHED = auto()
    FIN_WAIT_1 = auto()
    FIN_WAIT_2 = auto()
    CLOSING = auto()
    CLOSE_WAIT = auto()
    LAST_ACK = auto()
    TIME_WAIT = auto()


class Event(Enum):
    """What can move a session from one state to another."""

    OPEN = auto()  # our SYN was sent
    SYN_ACK = auto()  # the target's SYN acknowledged ours
    FIN_SENT = auto()  # the client's FIN was released and sent
    FIN_ACKED = auto()  # the target acknowledged our FIN
    FIN_RECEIVED = auto()  # the target's FIN arrived in order
    RESET = auto()  # the target sent an acceptable RST
    ABORT = auto()  # we gave up or the client sent RST
    EXPIRED = auto()  # TIME_WAIT is over


_S, _E = State, Event

TRANSITIONS: dict[tuple[State, Event], State] = {
    (_S.CLOSED, _E.OPEN): _S.SYN_SENT,
    (_S.SYN_SENT, _E.SYN_ACK): _S.ESTABLISHED,
    (_S.ESTABLISHED, _E.FIN_SENT): _S.FIN_WAIT_1,
    (_S.ESTABLISHED, _E.FIN_RECEIVED): _S.CLOSE_WAIT,
    (_S.FIN_WAIT_1, _E.FIN_ACKED): _S.FIN_WAIT_2,
    (_S.FIN_WAIT_1, _E.FIN_RECEIVED): _S.CLOSING,
    (_S.FIN_WAIT_2, _E.FIN_RECEIVED): _S.TIME_WAIT,
    (_S.CLOSING, _E.FIN_ACKED): _S.TIME_WAIT,
    (_S.CLOSE_WAIT, _E.FIN_SENT): _S.LAST_ACK,
    (_S.LAST_ACK, _E.FIN_ACKED): _S.CLOSED,
    (_S.TIME_WAIT, _E.EXPIRED): _S.CLOSED,
}
for _state in State:
    if _state is not State.CLOSED:
        TRANSITIONS[_state, Event.RESET] = State.CLOSED
        TRANSITIONS[_state, Event.ABORT] = State.CLOSED

#: States in which the client's data may still be sent (RFC 9293 3.10.2).
MAY_SEND = frozenset({State.ESTABLISHED, State.CLOSE_WAIT})

#: States in which our FIN is out and not yet acknowledged.
FIN_IN_FLIGHT = frozenset({State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK})

#: States in which the target may still send data (RFC 9293 3.10.7.4).
MAY_RECEIVE = frozenset({State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2})


#: States in which both sides have sent everything, FIN included.
SAID_ALL = frozenset({State.CLOSING, State.LAST_ACK, State.TIME_WAIT})


class Outcome(Enum):
    """How a session ended; the value is the name of its counter in the ledger."""

    CLOSED = "closed"  # FIN both ways
    CLIENT_RESET = "client_reset"  # the client sent RST
    TARGET_RESET = "target_reset"  # the target sent RST and nothing was left to send
    TARGET_REFUSED = "target_refused"  # RST in response to our SYN
    TARGET_SILENT = "target_silent"  # no response within the limit
    GAP = "gap"  # client bytes missing from the capture
    IDLE = "idle"  # nothing to do for too long
    QUEUE_FULL = "queue_full"  # more held than the limit allows
    SUPERSEDED = "superseded"  # the client used the port again
    INTERCEPT_ENDED = "intercept_ended"  # pycopy intercept was stopped first
    RUN_ENDED = "run_ended"  # pycopy was stopped first
