"""What the user asked for: the configurations of replay and intercept."""

import os
from dataclasses import dataclass, field

from pycopy.command.services import Service
from pycopy.command.values import INTERCEPT_PORT, Network

RESPONSE_IDLE_S = 600
#: What -k adds to -t when it is not given: a session with nothing left to send is kept longer.
SESSION_IDLE_EXTRA_S = 120

#: Of a capture's rings, and which part of this host's memory they take at most: a burst comes
#: as fast as the network, and waits in them until it is this process's turn on a busy CPU.
RING_MOST_BYTES = 128 << 20
RING_LEAST_BYTES = 1 << 20
RING_SHARE = 64


@dataclass
class ProcessConfig:
    """What replay and intercept have in common: the process itself and what it reports."""

    interfaces: list[str] = field(default_factory=list)  #: [] is the driver's default choice
    filter: str = ""  #: pcap-filter(7) expression, "" is everything
    daemon: bool = False
    log_path: str = ""  #: "" is stderr
    pid_path: str = ""  #: "" is none
    json: bool = False
    interval_s: float = 10.0
    quiet: bool = False
    ring_bytes: int = 4 << 20  #: of kernel memory; a power of two
    transport: str = "ring"  #: of records to user space: "ring" or "perf"


def default_ring_bytes(workers: int = 1) -> int:
    """What each of so many workers' captures may fill before its records are read."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = min(memory_bytes // RING_SHARE, RING_MOST_BYTES) // workers
    return 1 << (max(share, RING_LEAST_BYTES).bit_length() - 1)


@dataclass
class ReplayConfig(ProcessConfig):
    """``pycopy replay``."""

    ring_bytes: int = field(default_factory=default_ring_bytes)
    services: list[Service] = field(default_factory=list)
    intercepts: list[tuple[str, int]] = field(default_factory=list)  #: numeric address, port
    client_pool: list[Network] = field(default_factory=list)
    hook: str = "tc"  #: "tc" or "xdp"
    fastpath: bool = True  #: the kernel keeps the healthy sessions
    backlog_bytes: int = 64 << 20  #: of what it has sent and holds, in all
    forwarded: bool = False  #: a service without an address is anybody's, not only this host's
    wait_for_response: bool = True
    only_full_sessions: bool = False
    sample_percent: int = 100
    ramp: bool = False
    response_idle_s: int = RESPONSE_IDLE_S
    session_idle_s: int = RESPONSE_IDLE_S + SESSION_IDLE_EXTRA_S
    memory_mb: int = 1024
    max_sessions: int = 65536
    self_ports: tuple[int, int] | None = None  #: inclusive; None is the driver's choice
    mtu: int = 0  #: 0 is the route's
    lonely: bool = False
    allow_public_target: bool = False
    workers: int = 1  #: processes that share the flows
    worker: int = 0  #: which of them this is


@dataclass
class InterceptConfig(ProcessConfig):
    """``pycopy intercept``."""

    placement: str = "auto"  #: "auto", "assistant" or "target"
    hook: str = "tc"  #: on an assistant: "tc" or "xdp"
    bind: str = ""  #: "" is every address of this host, IPv4 and IPv6
    port: int = INTERCEPT_PORT
    pass_nets: list[Network] = field(default_factory=list)
