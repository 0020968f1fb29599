#!/usr/bin/python3
"""Draw the session's state machine from its transition table: docs/make_diagram.py

Writes docs/states.md. A test compares the committed file with what this gives, so that the
picture cannot go stale. RESET and ABORT lead from every state to CLOSED and are told in words.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pycopy.session.states import TRANSITIONS, Event, State

PAGE = """\
# The states of a session

A session is the client of a TCP connection to the target: RFC 9293 3.3.2 as the active opener
sees it. Drawn from `TRANSITIONS` in `pycopy/session/states.py` by `docs/make_diagram.py`; do
not edit.

```mermaid
stateDiagram-v2
    direction TB
    [*] --> CLOSED
{edges}
```

From every state but CLOSED, {everywhere} lead to CLOSED.

| event | what happened |
|---|---|
{events}
"""

MEANINGS = {
    Event.OPEN: "our SYN was sent",
    Event.SYN_ACK: "the target's SYN acknowledged ours",
    Event.FIN_SENT: "the client's FIN was released and sent, or ours to move to another connection",
    Event.FIN_ACKED: "the target acknowledged our FIN",
    Event.FIN_RECEIVED: "the target's FIN arrived, and nothing before it is missing",
    Event.RESET: "the target reset the connection, or is silent for too long",
    Event.ABORT: "we reset it: the client did, or a limit was reached",
    Event.EXPIRED: "TIME_WAIT is over",
}


def leads_home(event):
    """The event takes every open state to CLOSED, and does nothing else."""
    ends = {state: TRANSITIONS.get((state, event)) for state in State}
    return all(
        end is (None if state is State.CLOSED else State.CLOSED) for state, end in ends.items()
    )


def page():
    everywhere = [event for event in Event if leads_home(event)]
    edges = [
        f"    {state.name} --> {end.name}: {event.name}"
        for (state, event), end in TRANSITIONS.items()
        if event not in everywhere
    ]
    return PAGE.format(
        edges="\n".join(edges),
        everywhere=" and ".join(event.name for event in everywhere),
        events="\n".join(f"| {event.name} | {MEANINGS[event]} |" for event in Event),
    )


if __name__ == "__main__":
    (Path(__file__).parent / "states.md").write_text(page())
