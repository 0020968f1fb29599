"""The table of options: each command's configuration, an option a field.

A field has its type, the option as ``--help`` shows it, its default, the parser of what is typed,
its heading and its help; ``was`` is what the letter means in tcpcopy or intercept, whose letters
these are, so that their users' command lines carry over. Letters of theirs that are not taken are
``refused``, with what to do instead. Whoever adds an option adds a field, and its tests.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pycopy.command.declare import Configuration, Group, Option, flag, option, refuse
from pycopy.command.services import Service, parse_services
from pycopy.command.values import (
    INTERCEPT_PORT,
    Network,
    as_typed,
    one_of,
    parse_bind,
    parse_bytes,
    parse_interfaces,
    parse_interval,
    parse_networks,
    parse_percent,
    parse_ports,
    size_text,
    some_of,
    whole,
)

RESPONSE_IDLE_S = 600
#: What -k adds to -t when it is not given: a session with nothing left to send is kept longer.
SESSION_IDLE_EXTRA_S = 120

#: Without -m a worker may have so much, with it no less: it needs half of that by itself.
WORKER_MEMORY_MB = 64

#: Of a capture's rings, and which part of this host's memory they take at most: a burst comes
#: as fast as the network, and waits in them until it is this process's turn on a busy CPU.
RING_MOST_BYTES = 128 << 20
RING_LEAST_BYTES = 1 << 20
RING_SHARE = 64

#: What the fast path has sent and may have to repeat takes so much of kernel memory, in all.
BACKLOG_BYTES = 64 << 20

#: Where a daemon writes without -l.
DAEMON_LOG = "/var/log/pycopy-{command}.log"

LAB_NAME = "pycopy-lab"
_PLACEMENTS = ("self", "target", "assistant")
_FAMILIES = ("4", "6")

_NOT_YET = "this release does not have it"
_OFFLINE = "replaying a pcap file is not in this release; -i takes network devices"


def default_ring_bytes(workers: int = 1) -> int:
    """What each of so many workers' captures may fill before its records are read."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = min(memory_bytes // RING_SHARE, RING_MOST_BYTES) // workers
    return 1 << (max(share, RING_LEAST_BYTES).bit_length() - 1)


# Options that more than one command has, and what they differ in.


def _interfaces(group: Group, was: str = "") -> list[str]:
    about = "network devices, comma separated (all)"
    return option("-i, --interface DEVICES", [], parse_interfaces, group, about, was=was)


def _filter(group: Group, about: str) -> str:
    was = "the filter of the capture, as in pcap-filter(7)"
    return option("-F, --filter EXPR", "", as_typed, group, about, was=was)


def _hook(group: Group, about: str) -> str:
    return option("--hook tc|xdp", "tc", one_of("tc", "xdp"), group, about)


def _quiet(was: str = "") -> bool:
    about = "nothing but the ready line, warnings and the summary"
    return flag("-q, --quiet", Group.PROCESS, about, was=was)


def _ring(default: int | Callable[[], int], shown: str) -> int:
    about = f"size of the kernel's ring buffer ({shown})"
    return option("--ring SIZE", default, parse_bytes, Group.PROCESS, about)


# Fields are declared by calls, and laid out by hand: an option with few lines is easier to find.
# ruff: noqa: RUF009
# fmt: off
@dataclass
class ProcessConfig(Configuration):
    """What replay and intercept have in common: the process itself and what it reports."""

    daemon: bool = flag(
        "-d, --daemon", Group.PROCESS, "run in the background", was="run as a daemon")
    log_path: str = option(  # "" is stderr
        "-l, --log FILE", "", as_typed, Group.PROCESS,
        f"messages go here (stderr; as a daemon {DAEMON_LOG})", was="the log file")
    pid_path: str = option(  # "" is none
        "-P, --pid-file FILE", "", as_typed, Group.PROCESS, "write the process id here",
        was="the file for the process id, with -d")
    json: bool = flag("--json", Group.PROCESS, "JSON lines on stdout, the summary last")
    interval_s: float = option(
        "--interval S", 10.0, parse_interval, Group.PROCESS,
        "seconds between report lines ({default}), off a terminal")
    quiet: bool = _quiet()
    ring_bytes: int = _ring(4 << 20, "{default}")  # of kernel memory; a power of two
    transport: str = option(  # of records to user space
        "--transport ring|perf", "ring", one_of("ring", "perf"), Group.PROCESS,
        "records come by a BPF ring buffer (default), or by perf ring buffers of each CPU")


@dataclass
class ReplayConfig(ProcessConfig):
    """``pycopy replay``."""

    services: list[Service] = option(
        "-x, --copy SPEC", [], lambda text, _: parse_services(text), Group.COPIED,
        "[srcIP:]srcPort-dstIP:dstPort, comma separated; IPv6 in brackets; the first match"
        " wins; srcPort may be a range: as many target ports in a row, from dstPort on",
        was="source and target, with their MAC addresses in some builds")
    interfaces: list[str] = _interfaces(  # [] is the driver's default choice
        Group.COPIED, was="the device to capture from, or in some builds a pcap file")
    filter: str = _filter(Group.COPIED, "only what this pcap-filter(7) expression takes")
    sample_percent: int = option(
        "-r, --sample PERCENT", 100, parse_percent, Group.COPIED,
        "share of the clients ({default})", was="the percentage of sessions to copy")
    ramp: bool = flag(
        "-g, --ramp", Group.COPIED, "start at 1 percent, one more every second",
        was="replay gradually")
    only_full_sessions: bool = flag(
        "-O, --full-sessions-only", Group.COPIED, "only connections whose SYN was seen",
        was="only full sessions")
    forwarded: bool = flag(  # a service without an address is anybody's, not only this host's
        "--forwarded", Group.COPIED,
        "also what is not addressed to this host: on a gateway or a mirror port")
    hook: str = _hook(Group.COPIED, "{default} (default) or xdp (attaching resets some NICs)")
    fastpath: bool = flag(  # the kernel keeps the healthy sessions
        "--no-fastpath", Group.COPIED,
        "every segment through user space, healthy sessions too", default=True)
    backlog_bytes: int = option(
        "--backlog SIZE", BACKLOG_BYTES, parse_bytes, Group.COPIED,
        "kernel memory for what the fast path has sent and may have to repeat ({default})")

    intercepts: list[tuple[str, int]] = option(  # numeric address, port
        "-s, --intercept HOST[:PORT]", [], None, Group.RESPONSES,
        "hosts where 'pycopy intercept' runs, comma separated; default: this host intercepts",
        was="the intercepts, with their ports")
    intercept_port: int = option(
        "-p, --intercept-port PORT", INTERCEPT_PORT, whole(1, 65535, "the port"),
        Group.RESPONSES, "for -s entries without a port ({default})",
        was="the port of the intercepts")
    client_pool: list[Network] = option(
        "-c, --clients RANGES", [], parse_networks, Group.RESPONSES,
        "with -s: map clients to 62.135.200.x, CIDR or addresses, comma separated",
        was="the client addresses that the target is to see")
    self_ports: tuple[int, int] | None = option(  # inclusive; None is the driver's choice
        "--ports A-B", None, parse_ports, Group.RESPONSES,
        "without -s: local ports to use, outside the ephemeral range")
    lonely: bool = flag(
        "-L, --lonely", Group.RESPONSES, "start even if no intercept can be reached yet",
        was="go on when the intercept is gone")

    wait_for_response: bool = flag(
        "-W, --no-wait", Group.PACE,
        "send requests as they come, without waiting for the target's responses",
        was="do not wait for responses", default=True)
    response_idle_s: int = option(
        "-t, --response-timeout S", RESPONSE_IDLE_S, whole(1, 86400, "seconds"), Group.PACE,
        "end a session after S seconds without a response from the target ({default})",
        was="how long a session waits for a response")
    session_idle_s: int = option(
        "-k, --idle-timeout S", RESPONSE_IDLE_S + SESSION_IDLE_EXTRA_S,
        whole(1, 7 * 86400, "seconds"), Group.PACE,
        f"end a session after S seconds without traffic (-t plus {SESSION_IDLE_EXTRA_S})",
        was="how long an idle session is kept")
    memory_mb: int = option(
        "-m, --memory MB", 1024, whole(16, 1 << 20, "megabytes"), Group.PACE,
        "memory limit for sessions, in MB ({default}, or"
        f" {WORKER_MEMORY_MB} per worker if that is more)",
        was="the memory, in MB, beyond which it quits")
    max_sessions: int = option(
        "--max-sessions N", 65536, whole(1, 1 << 24, "sessions"), Group.PACE,
        "most sessions at a time ({default})")
    mtu: int = option(  # 0 is the route's
        "-M, --mtu BYTES", 0, whole(576, 65535, "the MTU"), Group.PACE,
        "MTU towards the target (default: the route's)", was="the MTU towards the target")
    allow_public_target: bool = flag(
        "--allow-public-target", Group.PACE, "the target may be a public internet address")
    workers: int = option(  # processes that share the flows
        "--workers N|auto", 1, None, Group.PACE,
        "processes among which the flows are spread ({default}); auto: one for each CPU")

    ring_bytes: int = _ring(
        default_ring_bytes,
        f"a {RING_SHARE}th of this host's memory, {size_text(RING_MOST_BYTES)} at most")
    worker: int = 0  #: which of the workers this is

    refused: ClassVar[Sequence[Option]] = (
        refuse("-n", "copies of each session",
               f"{_NOT_YET}; without -s, a second replay makes a second copy"),
        refuse("-f", "the port shift",
               "leave it out: ports come from an allocator that knows those in use"),
        refuse("-C", "connections per intercept",
               "leave it out: one batched connection is enough"),
        refuse("-B", "the pcap buffer", "use --ring SIZE: there is a BPF ring instead"),
        refuse("-S", "the snap length", "leave it out: segments are always taken whole"),
        refuse("-R", "the default round trip time",
               "leave it out: it is measured, by RFC 6298"),
        refuse("-U", "the session pool size",
               "leave it out: memory is bounded by -m and --max-sessions"),
        refuse("-D", "the MSS of made-up SYNs",
               "leave it out: it follows the path's MTU, or -M"),
        refuse("-H", "another source for clients on 127.0.0.1",
               "leave -s out, and copies leave under this host's own address; or map clients"
               " with -c"),
        refuse("-o", "the output device", "leave it out: it follows the kernel's routes"),
        refuse("-a", "acceleration of a pcap file", _OFFLINE),
        refuse("-I", "the longest gap in a pcap file", _OFFLINE),
        refuse("-T", "the repetitions of a pcap file", _OFFLINE),
    )


@dataclass
class InterceptConfig(ProcessConfig):
    """``pycopy intercept``."""

    interfaces: list[str] = _interfaces(Group.TAKEN, was="the device to capture from")
    filter: str = _filter(Group.TAKEN, "required: the target's responses, as pcap-filter(7)")
    pass_nets: list[Network] = option(
        # Named in full: -x is another thing to replay, where its sentences name the letter.
        "-x, --pass RANGES", [], lambda text, _: parse_networks(text, "--pass"), Group.TAKEN,
        "clients whose responses always pass: 10.1.0.x, CIDR or addresses",
        was="the addresses that pass the firewall", repeated=True)
    placement: str = option(
        "--at PLACE", "auto", one_of("auto", "target", "assistant"), Group.TAKEN,
        "this host is: target, assistant, {default} (default)")
    hook: str = _hook(
        Group.TAKEN,
        "on an assistant: {default} (default) or xdp (every response over the channel)")
    bind: str = option(  # "" is every address of this host, IPv4 and IPv6
        "-b, --bind ADDRESS", "", parse_bind, Group.CHANNEL, "this address (all)",
        was="the address to listen on")
    port: int = option(
        "-p, --port PORT", INTERCEPT_PORT, whole(1, 65535, "the port"), Group.CHANNEL,
        "this port ({default})", was="the port to listen on")
    quiet: bool = _quiet(was="the length of the nfqueue, a number")

    refused: ClassVar[Sequence[Option]] = (
        refuse("-n", "the combining of records",
               "leave it out: batches adapt to the load by themselves"),
        refuse("-s", "the hash size", "leave it out: tables grow as needed, within bounds"),
        refuse("-D", "the docker address pair",
               f"{_NOT_YET}; intercept inside the container's network"),
        refuse("-c", "protection of the first connection",
               "leave it out: several replays share intercept"),
    )


@dataclass
class LabConfig(Configuration):
    """``pycopy lab``."""

    name: str = option(
        "--name NAME", LAB_NAME, as_typed, Group.ALONE, "of the lab ({default})")


@dataclass
class DemoConfig(Configuration):
    """``pycopy demo``."""

    placements: list[str] = option(
        "--placement PLACES", [*_PLACEMENTS], some_of(*_PLACEMENTS), Group.ALONE,
        f"{', '.join(_PLACEMENTS)}, comma separated (all)")
    families: list[str] = option(
        "--family FAMILIES", [*_FAMILIES], some_of(*_FAMILIES), Group.ALONE,
        f"{', '.join(_FAMILIES)}, comma separated (both)")
    requests: int = option(
        "--requests N", 10_007, whole(1, 10**9, "requests"), Group.ALONE,
        "for each row ({default})")
    connections: int = option(
        "--connections N", 1009, whole(1, 10**9, "connections"), Group.ALONE,
        "for each row ({default})")
    json: bool = flag("--json", Group.ALONE, "the table as JSON, on stdout")


@dataclass
class DetachConfig(Configuration):
    """``pycopy detach``."""

    interfaces: list[str] = _interfaces(Group.ALONE)  # [] is all


@dataclass
class BpfConfig(Configuration):
    """``pycopy bpf``."""

    output: str = option(  # "" is where they are installed
        "--output DIR", "", as_typed, Group.ALONE,
        "where the objects are, or are to be (with the sources)")
# fmt: on
