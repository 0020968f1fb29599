"""Headers of emissions, read back by scapy."""

import ipaddress

import pytest

from pycopy.session import rewrite
from pycopy.session.connection import Emission
from pycopy.session.session import Session
from pycopy.session.views import Online, Target
from pycopy.wire import headers
from pycopy.wire.address import map_address
from pycopy.wire.segment import (
    ACK,
    FIN,
    KEY,
    OPT_SACK_PERM,
    OPT_TIMESTAMPS,
    OPT_WSCALE,
    PSH,
    RST,
    SYN,
)

layers = pytest.importorskip("scapy.layers.all")

ADDRESSES = {4: ("10.0.0.1", "10.0.0.2"), 6: ("fc00::1", "fc00::2")}
ALL = OPT_WSCALE | OPT_SACK_PERM | OPT_TIMESTAMPS


def session(family=4, options=ALL, mss=1460):
    source, target = (map_address(ipaddress.ip_address(each)) for each in ADDRESSES[family])
    view = Target(1000, 1, mss, 0)
    view.options, view.rcv_wscale, view.irs, view.ts_recent = options, 7, 5000, 77
    made = Session(None, b"", KEY.pack(source, target, 40000, 80), family, 0, Online(0), view, 0)
    made.flow = headers.Flow(family, source, target, 40000, 80)
    return made


def written(made, flags, data=b"", mtu=1500):
    buffer = bytearray(headers.HEADER_BYTES_MAX)
    emission = Emission(made, flags, 1001, 5001, 33, data)
    size = rewrite.write(
        buffer, emission, made.flow, bytes(12) + (b"\x08\0", b"\x86\xdd")[made.family == 6], mtu
    )
    frame = layers.Ether(bytes(buffer[10:size]) + data)
    gso_size = int.from_bytes(buffer[4:6], "little")
    return frame[layers.TCP], gso_size


@pytest.mark.parametrize("family", [4, 6])
def test_a_data_segment(family):
    tcp, gso_size = written(session(family), PSH | ACK, b"hello")
    assert (tcp.sport, tcp.dport, tcp.seq, tcp.ack) == (40000, 80, 1001, 5001)
    assert str(tcp.flags) == "PA" and tcp.window == 0xFFFF and bytes(tcp.payload) == b"hello"
    assert dict(tcp.options)["Timestamp"] == (33, 77) and gso_size == 0


def test_a_syn_has_the_clients_options():
    options = dict(written(session(), SYN)[0].options)
    assert options["MSS"] == 1460 and options["WScale"] == 7 and "SAckOK" in options
    assert options["Timestamp"] == (33, 0)
    assert dict(written(session(options=0), SYN)[0].options) == {"MSS": 1460}


def test_resets():
    assert written(session(), RST)[0].options == []
    assert "Timestamp" in dict(written(session(), RST | ACK)[0].options)


def test_sack_blocks_are_of_the_targets_stream():
    made = session()
    made.target.early = ((11, 21), (31, 41), (51, 61), (71, 81))
    options = dict(written(made, ACK)[0].options)
    assert options["SAck"] == (5011, 5021, 5031, 5041, 5051, 5061)
    assert options["Timestamp"] == (33, 77)
    made.target.options = OPT_SACK_PERM
    assert len(dict(written(made, ACK)[0].options)["SAck"]) == 8
    made.target.options = 0
    assert written(made, ACK)[0].options == []


@pytest.mark.parametrize(
    "family, mss, mtu, cut",
    [(4, 1460, 1500, 1448), (6, 1460, 1500, 1428), (4, 536, 1500, 524), (4, 1460, 1400, 1348)],
)
def test_super_segments_are_cut_to_what_target_and_path_take(family, mss, mtu, cut):
    tcp, gso_size = written(session(family, mss=mss), PSH | FIN | ACK, bytes(5000), mtu)
    assert gso_size == cut and len(tcp.payload) == 5000
