"""bpf/pycopy.h against its twins in Python: what the compiler made of the one, and the other.

By construction: every #define, enum and struct that the header has is found in its text, and each
is compared here or named with the reason why it is not. What is compared is what the compiler
says: values, offsets and sizes.
"""

import re
import struct
from typing import NamedTuple

import pytest

from pycopy.kernel import abi, objects, shapes, syscall
from pycopy.report import ledger
from pycopy.session import views
from pycopy.session.fates import HOLD_BUCKETS_US
from pycopy.session.fields import KERNEL_SESSION, KernelSession, Known
from pycopy.session.states import State
from pycopy.wire import segment
from pycopy.wire.segment import KEY, SEGMENT, SEGMENT_BYTES, Segment
from tests.bpf.sources import load

#: Width in bytes of each letter of a struct format.
WIDTHS = {"Q": 8, "I": 4, "H": 2, "h": 2, "B": 1}

#: Every constant of the header, but for C_ONLY.
CONSTANTS = {
    "PYCOPY_CLIENT": segment.KIND_CLIENT,
    "PYCOPY_TARGET": segment.KIND_TARGET,
    "PYCOPY_TOO_BIG": segment.KIND_TOO_BIG,
    "PYCOPY_PIECE_BYTES": segment.PIECE_BYTES,
    "PYCOPY_AT_ONCE": views.AT_ONCE,
    "PYCOPY_CAP_COUNTS": len(abi.CaptureCount),
    "PYCOPY_INT_COUNTS": len(abi.InterceptCount),
    "PYCOPY_LEFT_REASONS": len(abi.Left),
    "PYCOPY_FAST_COUNTS": abi.FAST_COUNTS,
    **{f"PYCOPY_OPT_{name}": getattr(segment, f"OPT_{name}")
       for name in ("MSS", "WSCALE", "SACK_PERM", "TIMESTAMPS")},
    # By the same name in both.
    **{f"PYCOPY_{name}": getattr(abi, name)
       for name in ("ABI_VERSION", "PASS", "SWALLOW", "RELAY", "RELAYS", "RELAYED_SEGMENT", "PROBE",
                    "POOL_NETWORKS", "LINK_CONSTANT", "LINK_FILTER", "LAPSE_NS", "GRACE_NS",
                    "PORT_OWN", "PORT_ANYBODYS", "PORT_GIVEN", "PORT_INDEX", "SCRATCH_BYTES",
                    "RELAY_WORK_BYTES", "WORK_BYTES", "PENDING_SLOTS", "CURSORS", "FILL_SLOTS",
                    "HELD_MAX", "NO_SLOT", "LOG_CPU_SHIFT", "LOG_BOUNDARY", "LOG_PAYLOAD",
                    "LOG_ROOM", "RELEASE_BYTES", "HOLD_BUCKETS", "TAKE", "HAVE", "GIVE", "DROP",
                    "FILL")},
    **{f"PYCOPY_KNOWN_{bit.name}": bit.value for bit in Known},
    **{f"PYCOPY_TIMER_{mark}": getattr(abi, f"TIMER_{mark}")
       for mark in ("BEGIN", "BEGIN_ALL", "GO_ON", "GO_ON_ALL", "DONE", "PENDING", "HELD",
                    "ATTENTION", "SEEN")},
    **{f"PYCOPY_CONSTANT_{each.name}": each.value for each in abi.Constant},
    **{f"PYCOPY_MAP_{name.upper()}": number for name, number in shapes.NUMBERS.items()},
    **{f"PYCOPY_CAP_{kind.name}": kind.value for kind in abi.CaptureCount},
    **{f"PYCOPY_INT_{kind.name}": kind.value for kind in abi.InterceptCount},
    **{f"PYCOPY_FAST_{count.name}": count.value for count in abi.FastCount},
    **{f"PYCOPY_LEFT_{left.name}": left.value for left in abi.Left},
    **{f"PYCOPY_{owner.name}": owner.value for owner in abi.Owner},
    **{f"PYCOPY_{state.name}": state.value for state in State},
}  # fmt: skip

#: Constants that are in the header only, and why.
C_ONLY = {"PYCOPY_CURSOR_USED": "user space makes the map and never looks into it"}


class Twin(NamedTuple):
    """A struct of the header in Python, every byte of it."""

    packed: struct.Struct
    fields: tuple[str, ...]


STRUCTS = {
    "pycopy_segment": Twin(SEGMENT, Segment._fields),
    # A record's key is compared as bytes with what KEY packs.
    "pycopy_key": Twin(KEY, ("client_addr", "server_addr", "client_port", "server_port")),
    "pycopy_claim_key": Twin(abi.CLAIM_KEY, ("prefix_bits", "addr")),
    "pycopy_settings": Twin(
        struct.Struct(abi.SETTINGS.format.replace("7x", "7s")),
        ("worker", "workers", "port_lo", "port_hi", "channel_port", "datagram_port",
         "redirect_away", "reserved"),
    ),
    "pycopy_endpoint": Twin(
        struct.Struct(abi.ENDPOINT.format.replace("2x", "2s")), ("addr", "port", "reserved")
    ),
    "pycopy_relay": Twin(
        abi.RELAY_ENTRY,
        ("cookie", "ifindex", "family", "reserved", "l2", "source", "destination", "source_port",
         "destination_port"),
    ),
    "pycopy_datagram": Twin(
        struct.Struct(f"{abi.DATAGRAM_HEAD.format}{SEGMENT_BYTES}s"),
        ("cookie", "junk", "kind", "reserved", "segment"),
    ),
    "pycopy_session": Twin(KERNEL_SESSION, KernelSession._fields),
    "pycopy_pending": Twin(struct.Struct(f"{abi.PENDING_SLOTS}s"), ("words",)),
    "pycopy_flow": Twin(abi.FLOW, ("slot", "generation")),
    "pycopy_lingering": Twin(abi.LINGERING, ("slot", "generation", "until_ns")),
    "pycopy_log_record": Twin(abi.LOG_RECORD, abi.LogRecord._fields),
    "pycopy_log_head": Twin(abi.LOG_HEAD, ("head", "tail", "reserved")),
    "pycopy_hop": Twin(
        abi.HOP, ("ifindex", "usable", "family", "mss", "l2", "target_port", "source", "target")
    ),
    "pycopy_fast_config": Twin(
        abi.FAST_CONFIG,
        ("now_ns", "quiet_ns", "quiet_max_ns", "delayed_ack_ns", "rto_initial_ns", "rto_min_ns",
         "rto_max_ns", "time_wait_ns", "response_idle_ns", "idle_ns", "timestamp_origin", "closed",
         "wait_for_response", "ports", "pool4", "pool6"),
    ),
    "pycopy_pool": Twin(abi.POOL, ("high", "low", "before")),
    # A header, and behind it a whole session.
    "pycopy_command": Twin(
        struct.Struct(f"{abi.COMMAND.format}{KERNEL_SESSION.size}s"),
        ("request", "slot", "generation", "reserved", "session"),
    ),
    "pycopy_attention": Twin(abi.ATTENTION, ("slot", "generation")),
}  # fmt: skip


class Header:
    """What a text declares: names in order. What it includes (generated.h, which has functions as
    well, and which tests/unit/test_generate.py holds against Python) counts as its own."""

    def __init__(self, text, included=""):
        self.text = text.replace('#include "generated.h"\n', included)
        code = without_comments(text)
        # Whatever is written in another way would be passed over.
        rest = re.sub(r"^(?:enum|struct) \w+ \{.*?^\};|^\s*#[^\n]*", "", code, flags=re.S | re.M)
        assert not rest.strip(), f"neither a constant nor a struct: {rest.strip()}"
        assert not re.search(r"^#define \w+\(", code, re.M), "a macro that takes something"
        self.read(code)
        constants, structs = self.constants, self.structs
        self.read(without_comments(self.text))
        #: Those that the text has itself: none of them may be left out.
        self.own = set(constants) | set(structs)

    def read(self, code):
        bodies = re.findall(r"^(enum|struct) (\w+) \{(.*?)^\};", code, re.S | re.M)
        self.constants = re.findall(r"^#define (\w+)[ \t]+\S", code, re.M)
        self.structs = {}
        for kind, name, body in bodies:
            if kind == "enum":
                self.constants += [re.match(r"\w+", each)[0] for each in split(body, ",")]
            else:
                self.structs[name] = [
                    re.search(r"(\w+)\s*(?:\[[^\]]*\])*$", each)[1] for each in split(body, ";")
                ]


def without_comments(text):
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.S)


def split(body, separator):
    return [each.strip() for each in body.split(separator) if each.strip()]


def shipped():
    directory = objects.bpf_dir()
    return Header((directory / "pycopy.h").read_text(), (directory / "generated.h").read_text())


def facts(tmp_path, header, *expressions):
    """The values of constant C expressions, as a program compiled with the header sees them."""
    stores = "".join(f"\tfact({index}, {text});\n" for index, text in enumerate(expressions))
    source = tmp_path / "facts.c"
    source.write_text(
        f"""{header.text}
BPF_ARRAY(facts, u64, {len(expressions)});
static inline void fact(int index, u64 value) {{ facts.update(&index, &value); }}
int pycopy_facts(PYCOPY_CTX *ctx)
{{
{stores}	return 0;
}}
"""
    )
    module = load(source)
    syscall.test_run(module.program_fd, bytes(64))
    values = [
        struct.unpack("=Q", module.maps["facts"].lookup(struct.pack("=I", index)))[0]
        for index in range(len(expressions))
    ]
    module.close()
    return values


def layout(twin):
    """{name: (offset, bytes)} of a struct in Python."""
    fields, offset = {}, 0
    names = iter(twin.fields)
    for times, letter in re.findall(r"(\d*)([A-Za-z])", twin.packed.format):
        if letter == "s":
            fields[next(names)] = (offset, int(times))
            offset += int(times)
            continue
        for _ in range(int(times or 1)):
            fields[next(names)] = (offset, WIDTHS[letter])
            offset += WIDTHS[letter]
    assert offset == twin.packed.size and next(names, None) is None
    return fields


def expected():
    """{C expression: its value}, of everything that there is in Python."""
    values = dict(CONSTANTS)
    for name, twin in STRUCTS.items():
        values[f"sizeof(struct {name})"] = twin.packed.size
        for field, (offset, width) in layout(twin).items():
            values[f"__builtin_offsetof(struct {name}, {field})"] = offset
            values[f"sizeof(((struct {name} *)0)->{field})"] = width
    return values


def differences(tmp_path, header):
    """What the header and the twins do not have in common, in words."""
    known = {*CONSTANTS, *C_ONLY, *STRUCTS}
    missing = (header.own - known) | (known - {*header.constants, *header.structs})
    found = [f"{name}: only in one of them" for name in missing]
    for name, fields in header.structs.items():
        if name in STRUCTS and tuple(fields) != STRUCTS[name].fields:
            found.append(f"{name}: other fields")
    if found:
        return found
    values = expected()
    seen = zip(values.items(), facts(tmp_path, header, *values), strict=True)
    return [f"{text}: {value}, not {wanted}" for (text, wanted), value in seen if value != wanted]


def test_everything_in_the_header_is_the_same_in_python(tmp_path):
    header = shipped()
    assert len(header.constants) > 150 and len(header.structs) > 15
    assert not set(CONSTANTS) & set(C_ONLY)
    assert KERNEL_SESSION.size == abi.SESSION_BYTES
    assert differences(tmp_path, header) == []


EDITS = {
    "a bit of known": ("PYCOPY_KNOWN_DOUBT       0x40", "PYCOPY_KNOWN_DOUBT       0x80"),
    "a request": ("PYCOPY_HAVE = 2,", "PYCOPY_HAVE = 7,"),
    "two marks": (
        "PYCOPY_TIMER_PENDING   0x100\n#define PYCOPY_TIMER_HELD      0x200",
        "PYCOPY_TIMER_PENDING   0x200\n#define PYCOPY_TIMER_HELD      0x100",
    ),
    "a length": ("#define PYCOPY_RELEASE_BYTES 9216", "#define PYCOPY_RELEASE_BYTES 9217"),
    "a kind": ("PYCOPY_TOO_BIG = 3,", "PYCOPY_TOO_BIG = 4,"),
    "order of fields": (
        "struct pycopy_lingering {\n\t__u32 slot;\n\t__u32 generation;",
        "struct pycopy_lingering {\n\t__u32 generation;\n\t__u32 slot;",
    ),
    "another field": ("\t__u64 until_ns;\n", "\t__u64 until_ns;\n\t__u64 since_ns;\n"),
    "a wider field": ("\t__u16 held;", "\t__u32 held;"),
    "another counter": ("\tPYCOPY_CAP_KEPT,", "\tPYCOPY_CAP_ELSEWHERE,\n\tPYCOPY_CAP_KEPT,"),
    "another constant": ("#define PYCOPY_CURSORS", "#define PYCOPY_NEW 1\n#define PYCOPY_CURSORS"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_header_alone_is_noticed(edit, tmp_path):
    old, new = EDITS[edit]
    text = shipped().text
    assert text.count(old) == 1
    header = shipped()
    header.text = text.replace(old, new)
    header.read(without_comments(header.text))
    header.own |= {*header.constants, *header.structs} - {*shipped().constants, *shipped().structs}
    assert differences(tmp_path, header)


def test_what_is_written_in_another_way_is_not_passed_over():
    for line in ("typedef __u32 pycopy_port;", "#define PYCOPY_TWICE(x) (2 * (x))", "int pycopy;"):
        with pytest.raises(AssertionError):
            Header(f"{line}\n")


def test_no_struct_has_padding():
    """It would carry kernel memory to user space, and over the channel."""
    for name, twin in STRUCTS.items():
        assert sum(width for _, width in layout(twin).values()) == twin.packed.size, name


def test_sizes_that_others_count_on():
    assert (SEGMENT_BYTES, KEY.size) == (112, 36)
    assert STRUCTS["pycopy_datagram"].packed.size == abi.DATAGRAM_BYTES
    # Where TCP has its checksum from its header on, a datagram has nothing from UDP's on.
    assert 8 + layout(STRUCTS["pycopy_datagram"])["junk"][0] == 16


def test_every_map_has_its_number():
    """In the order of the header, and none twice."""
    names = [name for name in shipped().constants if name.startswith("PYCOPY_MAP_")]
    assert [name.removeprefix("PYCOPY_MAP_").lower() for name in names] == list(shapes.SHAPES)


def test_every_bucket_of_the_ledgers_histogram_is_counted():
    assert abi.HOLD_BUCKETS == len(HOLD_BUCKETS_US) + 1 == len(ledger.Ledger().hold)
    assert abi.FastCount.LEFT == abi.FastCount.HOLD_TIME + abi.HOLD_BUCKETS
