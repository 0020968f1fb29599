"""What C has of the session's declarations: ``python3 -P -m pycopy.fastpath.generate`` writes it.

From session/fields.py the struct and the reset of a slot, from session/states.py the states and
their transitions, and the numbers of the rules. The result, bpf/generated.h, is committed;
tests/unit/test_generate.py fails when it is not what is declared. Pure text: nothing is compiled.
"""

from collections.abc import Iterable, Iterator

from pycopy.kernel.objects import bpf_dir
from pycopy.session import receiving, rules, views
from pycopy.session.addresses import WORKER_MIX
from pycopy.session.fates import HOLD_BUCKETS_US
from pycopy.session.fields import FIELDS, Field, Known, Space
from pycopy.session.states import MAY_RECEIVE, TRANSITIONS, Event, State

NAME = "generated.h"

_COLUMNS = 100

#: Fields that are set in one chain: bcc's own pass over the text takes twice as long for each more.
_CHAIN = 4

#: Whose sequence number a field is.
_WHOSE = {Space.SENT: "client", Space.ONLINE: "online", Space.TARGET: "target"}

#: What happens to a session in the kernel. The other events make it leave, or free its slot.
_EVENTS = (Event.OPEN, Event.SYN_ACK, Event.FIN_SENT, Event.FIN_ACKED, Event.FIN_RECEIVED)

#: After LAST_ACK, too, a session stays in its slot for a while: late segments are answered there.
_LINGERS = {(State.LAST_ACK, Event.FIN_ACKED): State.TIME_WAIT}

_NUMBERS = (
    ("PYCOPY_DEFAULT_MSS_IPV4", rules.DEFAULT_MSS[4], "RFC 9293 3.7.1: a SYN without the option"),
    ("PYCOPY_DEFAULT_MSS_IPV6", rules.DEFAULT_MSS[6], ""),
    ("PYCOPY_MIN_MSS", rules.MIN_MSS, "Linux's TCP_MIN_MSS"),
    ("PYCOPY_WSCALE_MAX", rules.MAX_WSCALE, "RFC 7323 2.3: use it for anything larger"),
    ("PYCOPY_TIMESTAMPS_BYTES", rules.TIMESTAMPS_BYTES, "of every segment (RFC 7323 appendix A)"),
    ("PYCOPY_INITIAL_WINDOW", rules.INITIAL_WINDOW, "RFC 6928 2, in segments"),
    ("PYCOPY_NO_SSTHRESH", rules.NO_SSTHRESH, "bytes, more than any window has"),
    ("PYCOPY_STRETCH_MAX", receiving.STRETCH_MAX, "full-sized segments (receiving.py)"),
    ("PYCOPY_STRETCH_PAUSE", receiving.STRETCH_PAUSE, ""),
    ("PYCOPY_QUIET_ROUND_TRIPS", rules.QUIET_ROUND_TRIPS, "release.quiet_deadline_ns()"),
    ("PYCOPY_AT_ONCE", views.AT_ONCE, "a deadline long past: that one is not the timer's"),
    ("PYCOPY_HOLD_BUCKETS", len(HOLD_BUCKETS_US) + 1, "of the hold-time histogram"),
)

_HEAD = """\
/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * Generated: python3 -P -m pycopy.fastpath.generate
 *
 * A session as pycopy/session/ declares it: its fields (fields.py), its states and transitions
 * (states.py), and the numbers of its rules.
 */
#ifndef PYCOPY_GENERATED_H
#define PYCOPY_GENERATED_H
/* clang-format off */
"""

_FOOT = """
/* clang-format on */
#endif
"""

_RESET = """
/* The slot of a session that `segment`, the client's SYN, opens: with nothing of the last one. */
static __always_inline void pycopy_reset(struct pycopy_session *s,
\t\t\t\t\t const struct pycopy_segment *segment,
\t\t\t\t\t const struct pycopy_key *target, __u32 generation,
\t\t\t\t\t __u8 family, __u16 mss, __u64 rto_ns, __u64 now_ns)
{"""


def text() -> str:
    """The whole of bpf/generated.h."""
    parts = (_numbers(), _states(), _transitions(), _known(), _struct(), _reset())
    return _HEAD + "".join("\n".join((*part, "")) for part in parts) + _FOOT


def _define(name: str, value: str, comment: str) -> str:
    line = f"#define {name:24} {value}"
    return f"{line:43} /* {comment} */" if comment else line


def _numbers() -> Iterator[str]:
    yield "\n/* Numbers of the rules. */"
    for name, value, comment in _NUMBERS:
        yield _define(name, str(value), comment)
    yield "\n/* Bounds of the hold-time histogram, in nanoseconds; above, one more bucket. */"
    bounds = [f"each({bound * 1000}ULL) " for bound in HOLD_BUCKETS_US]
    yield "#define PYCOPY_HOLD_BOUNDS_NS(each) \\\n" + " \\\n".join(_wrapped(bounds))
    yield "\n/* How a client's port is mixed to find its worker: factor, then shift. */"
    steps = " ".join(f"each({factor:#x}, {shift})" for factor, shift in WORKER_MIX)
    yield f"#define PYCOPY_WORKER_MIX(each) \\\n\t{steps}"


def _states() -> Iterator[str]:
    yield "\n/* pycopy.session.states.State; TIME_WAIT is also what follows LAST_ACK. */"
    yield "enum pycopy_state {"
    yield from (f"\tPYCOPY_{state.name} = {state.value}," for state in State)
    yield "};\n\n/* What moves a session of the kernel's from one state to another. */"
    yield "enum pycopy_event {"
    yield from (f"\tPYCOPY_EVENT_{event.name} = {event.value}," for event in _EVENTS)
    yield "};\n\n/* States in which the target may still send data (RFC 9293 3.10.7.4). */"
    states = [f"(state) == PYCOPY_{each.name}" for each in State if each in MAY_RECEIVE]
    any_of = " || \\\n\t ".join(states)
    yield f"#define PYCOPY_MAY_RECEIVE(state) \\\n\t({any_of})"


def _transitions() -> Iterator[str]:
    yield "\n/* The state that follows; the same where the event means nothing. */"
    yield "static __always_inline __u8 pycopy_next_state(__u8 state, enum pycopy_event event)\n{"
    for event in _EVENTS:
        yield f"\tif (event == PYCOPY_EVENT_{event.name}) {{"
        for (state, what), end in (TRANSITIONS | _LINGERS).items():
            if what is event:
                yield f"\t\tif (state == PYCOPY_{state.name})\n\t\t\treturn PYCOPY_{end.name};"
        yield "\t}"
    yield "\treturn state;\n}"


def _known() -> Iterator[str]:
    yield "\n/* Bits of pycopy_session.known. */"
    for bit in Known:
        yield _define(f"PYCOPY_KNOWN_{bit.name}", f"{bit.value:#x}", bit.meaning)


def _struct() -> Iterator[str]:
    yield "\n/* In brackets: the unit, or whose sequence number it is (the client's, the online"
    yield " * server's, the target's); in capitals the bit of `known` that it needs."
    yield " */"
    yield "struct pycopy_session {"
    for field in FIELDS:
        line, comment = f"{field.type.c} {field.name};", _comment(field)
        yield f"\t{line:26} /* {comment} */" if comment else f"\t{line}"
    yield "};"


def _comment(field: Field) -> str:
    notes = [field.unit or _WHOSE.get(field.space, "")]
    if field.present:
        notes.append(field.present.name)
    said = ", ".join(filter(None, notes))
    return f"{field.meaning} [{said}]" if said else field.meaning


def _reset() -> Iterator[str]:
    yield _RESET
    alike: dict[tuple[str, str], list[str]] = {}
    for field in FIELDS:
        if field.reset:
            width = "" if field.reset == "0" else field.type.c
            alike.setdefault((field.reset, width), []).append(f"s->{field.name} = ")
    for (value, _), targets in alike.items():
        for at in range(0, len(targets), _CHAIN):
            yield "".join(("\t", *targets[at : at + _CHAIN], f"{value};"))
    yield "}"


def _wrapped(words: Iterable[str]) -> Iterator[str]:
    line = "\t"
    for word in words:
        if len(line.expandtabs()) + len(word) > _COLUMNS - 2:
            yield line.rstrip()
            line = "\t\t"
        line += word
    yield line.rstrip()


def main() -> None:
    (bpf_dir() / NAME).write_text(text())


if __name__ == "__main__":
    main()
