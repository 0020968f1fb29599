"""What bpf/parse.h should say of a frame, written again in Python from the RFCs.

Plain and slow on purpose: struct and slices, no shared code with pycopy. `look()` gives
the verdict of both parsing steps and the segment's fields; the tests compare them with
what the loaded programs did.
"""

import struct
from dataclasses import dataclass, field

MAPPED = bytes(10) + b"\xff\xff"
EXTENSIONS = 8

#: The fates. OTHER: not TCP, or nothing that a TCP would look at.
OTHER, WHOLE = "other", "whole"
FRAGMENT, TRUNCATED, MALFORMED = "fragment", "truncated", "malformed"


@dataclass
class Look:
    """One frame; `flow` is False where not even the ports are known."""

    fate: str = OTHER
    flow: bool = False
    src: bytes = b""
    dst: bytes = b""
    sport: int = 0
    dport: int = 0
    fields: dict = field(default_factory=dict)
    payload: bytes = b""


def look(frame, l2_bytes=14):
    ip = frame[l2_bytes:]
    if l2_bytes:
        kind = frame[12:14]
        for _ in range(2):
            if kind in (b"\x81\x00", b"\x88\xa8"):
                kind, ip = ip[2:4], ip[4:]
        wanted = {b"\x08\x00": 4, b"\x86\xdd": 6}.get(kind)
    else:
        wanted = ip[0] >> 4 if ip else None
    if wanted == 4:
        return _ipv4(ip)
    if wanted == 6:
        return _ipv6(ip)
    return Look()


def _ipv4(ip):
    if len(ip) < 20:
        return Look()
    header, total = (ip[0] & 15) * 4, int.from_bytes(ip[2:4], "big")
    if ip[0] >> 4 != 4 or header < 20 or ip[9] != 6:
        return Look()
    if total == 0:
        total = len(ip)
        if total <= 65535:
            return Look()
    offset = int.from_bytes(ip[6:8], "big")
    addresses = MAPPED + ip[12:16], MAPPED + ip[16:20]
    more, later = bool(offset & 0x2000), bool(offset & 0x1FFF)
    return _tcp(ip, header, total, addresses, more, later, 4)


def _ipv6(ip):
    if len(ip) < 40 or ip[0] >> 4 != 6:
        return Look()
    payload, following, at = int.from_bytes(ip[4:6], "big"), ip[6], 40
    if payload == 0:
        payload = len(ip) - 40
        if payload <= 65535:
            return Look()
    end, more = 40 + payload, False
    addresses = ip[8:24], ip[24:40]
    for _ in range(EXTENSIONS):
        if following == 6:
            break
        if following not in (0, 43, 44, 60) or at + 8 > end or at + 4 > len(ip):
            return Look()
        if following == 44:
            offset = int.from_bytes(ip[at + 2 : at + 4], "big")
            if offset & 0xFFF8:
                if ip[at] != 6:
                    return Look()
                return _tcp(ip, at + 8, end, addresses, True, True, 6)
            more |= bool(offset & 1)
            length = 8
        else:
            if following == 43 and ip[at + 3]:
                return Look()
            length = (ip[at + 1] + 1) * 8
        following, at = ip[at], at + length
    if following != 6:
        return Look()
    return _tcp(ip, at, end, addresses, more, False, 6)


def _tcp(ip, at, end, addresses, more, later, family):
    tcp = ip[at:]
    seen = Look(src=addresses[0], dst=addresses[1])
    if not later and at + 4 <= end and len(tcp) >= 4:
        seen.flow = True
        seen.sport, seen.dport = struct.unpack_from("!HH", tcp)
    if more or later:
        seen.fate = FRAGMENT
        return seen
    if not seen.flow:
        return Look()
    if at + 20 > end:
        seen.fate = MALFORMED
        return seen
    if len(ip) < end:
        seen.fate = TRUNCATED
        return seen
    header = (tcp[12] >> 4) * 4
    if header < 20 or at + header > end:
        seen.fate = MALFORMED
        return seen
    options = _options(tcp[20:header], bool(tcp[13] & 2))
    if options is None:
        seen.fate = MALFORMED
        return seen
    seq, ack, _, flags, wnd = struct.unpack_from("!IIBBH", tcp, 4)
    seen.payload = ip[at + header : end]
    seen.fields = {
        "tcp_flags": flags,
        "wnd": wnd,
        "seq": seq,
        "ack": ack,
        "family": family,
        "seg_len": len(seen.payload),
        **options,
    }
    seen.fate = WHOLE
    return seen


def _options(raw, syn):
    """The fields that come from options; None if a length in them leads nowhere."""
    found = {"options": 0, "wscale": 0, "mss": 0, "tsval": 0, "tsecr": 0, "sack": ()}
    while raw and raw[0] != 0:
        if raw[0] == 1:
            raw = raw[1:]
            continue
        if len(raw) < 2 or raw[1] < 2 or raw[1] > len(raw):
            return None
        kind, value, raw = raw[0], raw[2 : raw[1]], raw[raw[1] :]
        match kind, len(value), syn:
            case 8, 8, _:
                found["options"] |= 8
                found["tsval"], found["tsecr"] = struct.unpack("!II", value)
            case 5, 8 | 16 | 24 | 32, _:
                found["sack"] = struct.unpack(f"!{len(value) // 4}I", value)
            case 2, 2, True:
                found["options"] |= 1
                found["mss"] = int.from_bytes(value, "big")
            case 3, 1, True:
                found["options"] |= 2
                found["wscale"] = min(value[0], 14)
            case 4, 0, True:
                found["options"] |= 4
    return found
