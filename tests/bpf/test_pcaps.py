"""Recorded traffic through capture.c: every packet of every capture in $PYCOPY_PCAPS.

The frames pass unchanged and every record is what the oracle reads from the frame.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
from scapy.error import Scapy_Exception
from scapy.utils import RawPcapReader

from pycopy.kernel.abi import CaptureCount
from tests.bpf.harness import EVERY_PORT, Capture, check_record, runnable
from tests.bpf.oracle import look
from tests.bpf.test_random import Handshakes

PCAPS = os.environ.get("PYCOPY_PCAPS", "")

pytestmark = [
    pytest.mark.skipif(not PCAPS, reason="PYCOPY_PCAPS does not name a folder of captures"),
    pytest.mark.timeout(600),
]

LINKTYPE_ETHERNET = 1


def ethernet_frames(path):
    """The frames of a capture file; none of another link type."""
    reader = RawPcapReader(str(path))
    try:
        for frame, meta in reader:
            if getattr(meta, "linktype", getattr(reader, "linktype", None)) == LINKTYPE_ETHERNET:
                yield frame
    finally:
        reader.close()


def test_every_capture(hook):
    program = Capture(hook, services=EVERY_PORT)
    handshakes = Handshakes()
    seen = Counter()
    for path in sorted(Path(PCAPS).rglob("*")):
        if not path.is_file() or path.suffix not in (".pcap", ".pcapng", ".cap", ".dmp"):
            continue
        try:
            for number, frame in enumerate(ethernet_frames(path), 1):
                if not runnable(hook, frame):
                    seen["too long or short for BPF_PROG_TEST_RUN"] += 1
                    continue
                expected = handshakes.fate(look(frame))
                records = program.run(frame)
                counted = [kind for kind in program.changed if kind > CaptureCount.EXTRA_PIECES]
                assert counted == ([] if expected is None else [expected]), (path.name, number)
                if len(records) == 1:
                    check_record(records[0], frame)
                seen[expected] += 1
        except Scapy_Exception:
            seen["unreadable file"] += 1
    program.close()
    print(dict(seen))
    assert seen[CaptureCount.CAPTURED] > 0
