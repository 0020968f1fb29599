"""bpf/pycopy.h against pycopy/kernel/abi.py: what the compiler made of the one, and the other."""

import re
import struct

from pycopy.kernel import abi, objects, shapes, syscall
from pycopy.report import ledger
from pycopy.session.fates import HOLD_BUCKETS_US
from pycopy.session.fields import KERNEL_SESSION, KernelSession, Known
from pycopy.session.states import State
from pycopy.wire.segment import (
    KEY,
    KIND_CLIENT,
    KIND_TARGET,
    OPT_MSS,
    OPT_SACK_PERM,
    OPT_TIMESTAMPS,
    OPT_WSCALE,
    PIECE_BYTES,
    SEGMENT,
    SEGMENT_BYTES,
    Segment,
)
from tests.bpf.sources import load

#: Width in bytes of each letter of a struct format.
WIDTHS = {"Q": 8, "I": 4, "H": 2, "h": 2, "B": 1}


def facts(tmp_path, *expressions):
    """The values of constant C expressions, as a program compiled with the header sees them."""
    stores = "".join(f"\tfact({index}, {text});\n" for index, text in enumerate(expressions))
    source = tmp_path / "facts.c"
    source.write_text(
        f"""
#include "pycopy.h"
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


def layout(packed, names):
    """{name: (offset, bytes)} of a struct.Struct whose fields have these names."""
    fields, offset = {}, 0
    names = iter(names)
    for times, letter in re.findall(r"(\d*)([A-Za-z])", packed.format):
        if letter == "s":
            fields[next(names)] = (offset, int(times))
            offset += int(times)
            continue
        for _ in range(int(times or 1)):
            fields[next(names)] = (offset, WIDTHS[letter])
            offset += WIDTHS[letter]
    assert offset == packed.size and next(names, None) is None
    return fields


def check_layout(tmp_path, c_name, packed, names):
    expected = layout(packed, names)
    texts = [f"sizeof(struct {c_name})"]
    for name in expected:
        texts.append(f"__builtin_offsetof(struct {c_name}, {name})")
        texts.append(f"sizeof(((struct {c_name} *)0)->{name})")
    size, *pairs = facts(tmp_path, *texts)
    assert size == packed.size
    assert dict(zip(expected, zip(pairs[::2], pairs[1::2], strict=True), strict=True)) == expected


def test_segment(tmp_path):
    check_layout(tmp_path, "pycopy_segment", SEGMENT, Segment._fields)
    assert SEGMENT_BYTES == 112


def test_key(tmp_path):
    names = ("client_addr", "server_addr", "client_port", "server_port")
    check_layout(tmp_path, "pycopy_key", KEY, names)
    # A record's key is compared as bytes with what KEY packs: no padding anywhere.
    assert KEY.size == 36


def test_claim_key(tmp_path):
    check_layout(tmp_path, "pycopy_claim_key", abi.CLAIM_KEY, ("prefix_bits", "addr"))


def test_settings_and_endpoint(tmp_path):
    names = ("worker", "workers", "port_lo", "port_hi", "channel_port", "datagram_port",
             "redirect_away")  # fmt: skip
    packed = struct.Struct(abi.SETTINGS.format.replace("7x", "7s"))
    check_layout(tmp_path, "pycopy_settings", packed, (*names, "reserved"))
    packed = struct.Struct(abi.ENDPOINT.format.replace("2x", "2s"))
    check_layout(tmp_path, "pycopy_endpoint", packed, ("addr", "port", "reserved"))


def test_every_map_has_its_number():
    """The header has no map that bpfmaps lacks, and none twice."""
    text = (objects.bpf_dir() / "pycopy.h").read_text()
    body = text[text.index("enum pycopy_map {") :]
    names = re.findall(r"PYCOPY_MAP_(\w+)", body[: body.index("};")])
    assert [name.lower() for name in names] == list(shapes.SHAPES)


def test_segment_has_no_padding(tmp_path):
    """Padding would carry kernel memory to user space, and over the channel."""
    assert sum(width for _, width in layout(SEGMENT, Segment._fields).values()) == 112


def test_constants(tmp_path):
    expected = {
        "PYCOPY_ABI_VERSION": abi.ABI_VERSION,
        "PYCOPY_CLIENT": KIND_CLIENT,
        "PYCOPY_TARGET": KIND_TARGET,
        "PYCOPY_OPT_MSS": OPT_MSS,
        "PYCOPY_OPT_WSCALE": OPT_WSCALE,
        "PYCOPY_OPT_SACK_PERM": OPT_SACK_PERM,
        "PYCOPY_OPT_TIMESTAMPS": OPT_TIMESTAMPS,
        "PYCOPY_PIECE_BYTES": PIECE_BYTES,
        "PYCOPY_PASS": abi.PASS,
        "PYCOPY_SWALLOW": abi.SWALLOW,
        "PYCOPY_RELAY": abi.RELAY,
        "PYCOPY_RELAYS": abi.RELAYS,
        "PYCOPY_RELAYED_SEGMENT": abi.RELAYED_SEGMENT,
        "PYCOPY_PROBE": abi.PROBE,
        "PYCOPY_POOL_NETWORKS": abi.POOL_NETWORKS,
        "PYCOPY_CAP_COUNTS": len(abi.CaptureCount),
        "PYCOPY_INT_COUNTS": len(abi.InterceptCount),
        "PYCOPY_LINK_CONSTANT": abi.LINK_CONSTANT,
        "PYCOPY_LINK_FILTER": abi.LINK_FILTER,
        "PYCOPY_LAPSE_NS": abi.LAPSE_NS,
        "PYCOPY_GRACE_NS": abi.GRACE_NS,
        "PYCOPY_PORT_OWN": abi.PORT_OWN,
        "PYCOPY_PORT_ANYBODYS": abi.PORT_ANYBODYS,
        "PYCOPY_PORT_GIVEN": abi.PORT_GIVEN,
        "PYCOPY_PORT_INDEX": abi.PORT_INDEX,
        "PYCOPY_SCRATCH_BYTES": abi.SCRATCH_BYTES,
        "PYCOPY_RELAY_WORK_BYTES": abi.RELAY_WORK_BYTES,
        "PYCOPY_PENDING_SLOTS": abi.PENDING_SLOTS,
        "sizeof(struct pycopy_pending)": abi.PENDING_SLOTS,
        **{f"PYCOPY_CONSTANT_{each.name}": each.value for each in abi.Constant},
        **{f"PYCOPY_MAP_{name.upper()}": number for name, number in shapes.NUMBERS.items()},
        **{f"PYCOPY_CAP_{kind.name}": kind.value for kind in abi.CaptureCount},
        **{f"PYCOPY_INT_{kind.name}": kind.value for kind in abi.InterceptCount},
    }
    assert dict(zip(expected, facts(tmp_path, *expected), strict=True)) == expected


# -- sessions that the kernel keeps -------------------------------------------------------------


def test_relay_and_datagram(tmp_path):
    check_layout(tmp_path, "pycopy_relay", abi.RELAY_ENTRY, abi.RelayEntry._fields)
    packed = struct.Struct(f"{abi.DATAGRAM_HEAD.format}{SEGMENT_BYTES}s")
    check_layout(
        tmp_path, "pycopy_datagram", packed, ("cookie", "junk", "kind", "reserved", "segment")
    )
    assert packed.size == abi.DATAGRAM_BYTES
    # Where TCP has its checksum from its header on, a datagram has nothing from UDP's on.
    (tcp_check,) = facts(tmp_path, "8 + __builtin_offsetof(struct pycopy_datagram, junk)")
    assert tcp_check == 16


def test_pool(tmp_path):
    check_layout(tmp_path, "pycopy_pool", abi.POOL, ("high", "low", "before"))


def test_kernel_session(tmp_path):
    check_layout(tmp_path, "pycopy_session", KERNEL_SESSION, KernelSession._fields)


def test_flow_and_attention(tmp_path):
    check_layout(tmp_path, "pycopy_flow", abi.FLOW, ("slot", "generation"))
    check_layout(tmp_path, "pycopy_attention", abi.ATTENTION, ("slot", "generation"))


def test_log(tmp_path):
    check_layout(tmp_path, "pycopy_log_record", abi.LOG_RECORD, abi.LogRecord._fields)
    check_layout(tmp_path, "pycopy_log_head", abi.LOG_HEAD, ("head", "tail", "reserved"))


def test_hop(tmp_path):
    check_layout(tmp_path, "pycopy_hop", abi.HOP, abi.HopEntry._fields)


def test_fast_config(tmp_path):
    check_layout(tmp_path, "pycopy_fast_config", abi.FAST_CONFIG, abi.FastConfig._fields)


def test_command(tmp_path):
    """A header, and behind it a whole session."""
    packed = struct.Struct(f"{abi.COMMAND.format}{KERNEL_SESSION.size}s")
    names = ("request", "slot", "generation", "reserved", "session")
    assert KERNEL_SESSION.size == abi.SESSION_BYTES
    check_layout(tmp_path, "pycopy_command", packed, names)


def test_structs_of_the_kernels_sessions_have_no_padding():
    for packed, names in (
        (KERNEL_SESSION, KernelSession._fields),
        (abi.LOG_RECORD, abi.LogRecord._fields),
        (abi.HOP, abi.HopEntry._fields),
        (abi.FAST_CONFIG, abi.FastConfig._fields),
    ):
        assert sum(width for _, width in layout(packed, names).values()) == packed.size


def test_constants_of_the_kernels_sessions(tmp_path):
    expected = {
        **{f"PYCOPY_{owner.name}": owner.value for owner in abi.Owner},
        **{f"PYCOPY_{state.name}": state.value for state in State},
        **{f"PYCOPY_LEFT_{left.name}": left.value for left in abi.Left},
        "PYCOPY_LEFT_REASONS": len(abi.Left),
        **{f"PYCOPY_FAST_{count.name}": count.value for count in abi.FastCount},
        "PYCOPY_FAST_COUNTS": abi.FAST_COUNTS,
        **{f"PYCOPY_KNOWN_{bit.name}": bit.value for bit in Known},
        **{f"PYCOPY_{request}": getattr(abi, request)
           for request in ("TAKE", "HAVE", "GIVE", "DROP", "FILL")},
        "PYCOPY_FILL_SLOTS": abi.FILL_SLOTS,
        "PYCOPY_CURSORS": abi.CURSORS,
        **{f"PYCOPY_TIMER_{mark}": getattr(abi, f"TIMER_{mark}")
           for mark in ("BEGIN", "BEGIN_ALL", "GO_ON", "GO_ON_ALL", "DONE",
                        "PENDING", "HELD", "ATTENTION", "SEEN")},
        "PYCOPY_HELD_MAX": abi.HELD_MAX,
        "PYCOPY_NO_SLOT": abi.NO_SLOT,
        "PYCOPY_LOG_CPU_SHIFT": abi.LOG_CPU_SHIFT,
        "PYCOPY_LOG_BOUNDARY": abi.LOG_BOUNDARY,
        "PYCOPY_LOG_PAYLOAD": abi.LOG_PAYLOAD,
        "PYCOPY_WORK_BYTES": abi.WORK_BYTES,
        "PYCOPY_HOLD_BUCKETS": abi.HOLD_BUCKETS,
    }  # fmt: skip
    assert dict(zip(expected, facts(tmp_path, *expected), strict=True)) == expected


def test_every_bucket_of_the_ledgers_histogram_is_counted():
    assert abi.HOLD_BUCKETS == len(HOLD_BUCKETS_US) + 1 == len(ledger.Ledger().hold)
    assert abi.FastCount.LEFT == abi.FastCount.HOLD_TIME + abi.HOLD_BUCKETS
