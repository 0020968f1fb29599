"""The argument trees of the commands, and what their help teaches.

Letters are tcpcopy's and intercept's own, so that their users' command lines carry over;
every letter has a long name. A letter of theirs that pycopy does not take is answered with
the reason. Only argparse here: no value is judged (config.py), nothing is run (cli.py).

Tests: tests/unit/test_cli.py
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pycopy import __version__
from pycopy.command.config import RESPONSE_IDLE_S, SESSION_IDLE_EXTRA_S
from pycopy.command.values import INTERCEPT_PORT
from pycopy.errors import PycopyError, UsageError

COMMANDS = {
    "replay": "copy this host's traffic to a target server (online host)",
    "intercept": "take the target's responses back to replay (target or assistant)",
    "lab": "hosts in network namespaces, to try things out",
    "demo": "copy real traffic between real servers in a lab, and count",
    "detach": "remove what an older kernel left attached after a crash",
    "bpf": "show, verify or make anew the compiled BPF programs",
}

_EXITS = """\
exit status:
  0  done, also after SIGINT or SIGTERM     3  this host is unfit
  1  failed at run time                     4  refused by a safety guard
  2  wrong usage                          130  interrupted before it was ready,
                                               or by a second signal
"""

_SIGNALS = """\
signals:
  INT, TERM  drain and end; the second one ends at once
  HUP        reopen the log file (-l)        USR1  print the ledger
"""

TOP_HELP = f"""\
usage: pycopy COMMAND [options]     'pycopy COMMAND --help' teaches each one

Copies the live TCP traffic of an online server to a target server, where every
client connection is lived again in real time. Production is never delayed or
changed, real clients never see a copy's answer, no segment is lost unseen.

commands:
{{commands}}

try it, on one machine, touching nothing of it:
  sudo pycopy demo

use it, on one host (copies leave under this host's own address):
  sudo pycopy replay -x 80-10.0.0.2:8080

with the clients' own addresses (see 'pycopy replay --help'):
  target   sudo pycopy intercept -i eth0 -F 'tcp and src port 8080'
  online   sudo pycopy replay -x 80-10.0.0.2:8080 -s 10.0.0.2

options:
  -h, --help     this text
  -v, --version  the version

{_EXITS}"""

_REPLAY_ABOUT = """\
Copies the client segments of the services named with -x, live, to their
targets. Without -s the copies leave under this host's own address, and their
responses are taken out on the way in: one host, no route, one command. With -s
clients' addresses are kept (or mapped, -c), and 'pycopy intercept' on the
target or on an assistant takes the responses and sends their headers here.
"""

_REPLAY_EPILOG = f"""\
examples:
  pycopy replay -x 80-10.0.0.2:8080
      what arrives at port 80 goes to 10.0.0.2:8080 as well
  pycopy replay -x 80-10.0.0.2:8080,6379-10.0.0.2:6379 -r 10 -i eth0
      two services, one client in ten, from eth0 only
  pycopy replay -x 8000-8999-10.0.0.2:18000
      a thousand: 8000 goes to 18000, 8001 to 18001, and so on to 18999;
      with -x 8000-8999-10.0.0.2:80-80 all of them go to port 80
  pycopy replay -x 80-10.0.0.2:8080 -s 10.0.0.3 -c 62.135.200.x
      clients appear as 62.135.200.x; intercept runs on the assistant 10.0.0.3,
      and the target has a route: ip route add 62.135.200.0/24 via 10.0.0.3
  pycopy replay -x '80-[fd00::2]:8080' -s fd00::2 -d -l /var/log/pycopy.log
      IPv6, intercept on the target itself, as a daemon
  pycopy replay 10.0.0.1 80 10.0.0.2 8080
      the older form: local_ip1[:local_ip2...] local_port remote_ip remote_port

{_EXITS}
{_SIGNALS}"""

_INTERCEPT_ABOUT = """\
Takes the target server's responses to copied clients, so that no real client
ever sees one, and tells 'pycopy replay' how far the target has come. Typed the
same way on the target and on an assistant that its responses are routed to.
"""

_INTERCEPT_EPILOG = f"""\
examples:
  pycopy intercept -i eth0 -F 'tcp and src port 8080'
      on the target: no route needed. On an assistant: the target needs a route
      such as: ip route add 62.135.200.0/24 via ASSISTANT
  pycopy intercept -i eth0 -F 'tcp and src port 8080' -x 10.1.0.0/16 -d
      answers to 10.1.0.0/16 are real clients' and pass, as a daemon
  pycopy intercept -i eth0 -F 'tcp and src port 8080' -b 10.0.0.2 -p 40000
      listen for replay on one address and another port

{_EXITS}
{_SIGNALS}"""

_NOT_YET = "this release does not have it"
_OFFLINE = "replaying a pcap file is not in this release; -i takes network devices"

#: Letters of tcpcopy that replay does not take: what they were, and what to do instead.
REPLAY_REFUSED = {
    "-n": (
        "copies of each session",
        f"{_NOT_YET}; without -s, a second replay makes a second copy",
    ),
    "-f": ("the port shift", "leave it out: ports come from an allocator that knows those in use"),
    "-C": ("connections per intercept", "leave it out: one batched connection is enough"),
    "-B": ("the pcap buffer", "use --ring SIZE: there is a BPF ring instead"),
    "-S": ("the snap length", "leave it out: segments are always taken whole"),
    "-R": ("the default round trip time", "leave it out: it is measured, by RFC 6298"),
    "-U": ("the session pool size", "leave it out: memory is bounded by -m and --max-sessions"),
    "-D": ("the MSS of made-up SYNs", "leave it out: it follows the path's MTU, or -M"),
    "-H": (
        "another source for clients on 127.0.0.1",
        "leave -s out, and copies leave under this host's own address; or map clients with -c",
    ),
    "-o": ("the output device", "leave it out: it follows the kernel's routes"),
    "-a": ("acceleration of a pcap file", _OFFLINE),
    "-I": ("the longest gap in a pcap file", _OFFLINE),
    "-T": ("the repetitions of a pcap file", _OFFLINE),
}

#: The same of the original intercept.
INTERCEPT_REFUSED = {
    "-n": ("the combining of records", "leave it out: batches adapt to the load by themselves"),
    "-s": ("the hash size", "leave it out: tables grow as needed, within bounds"),
    "-D": ("the docker address pair", f"{_NOT_YET}; intercept inside the container's network"),
    "-c": ("protection of the first connection", "leave it out: several replays share intercept"),
}


def tell(text: str) -> None:
    """On stdout, now; a closed pipe (BrokenPipeError) is main()'s."""
    try:
        if text:  # /dev/full refuses even nothing
            print(text, end="")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise PycopyError(f"cannot write to stdout: {error.strerror}", "make room there") from None


class Parser(argparse.ArgumentParser):
    """argparse with our errors, ``-x, --copy SPEC`` in help, and 'did you mean'."""

    def __init__(self, command: str, usage: str, about: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"pycopy {command}",
            usage=usage,
            description=about,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"'{self.prog} --help' has examples")

    def _print_message(self, message: str, file: Any = None) -> None:
        # From Python 3.12 on argparse swallows write errors here.
        tell(message)

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Options as a namespace and the words that are not options, in any order."""
        options, rest = self.parse_known_args(argv)
        for word in rest:
            if word.startswith("-") and word != "--":
                self._refuse_unknown(word)
        return options, [word for word in rest if word != "--"]

    def _refuse_unknown(self, word: str) -> NoReturn:
        name = word.partition("=")[0]
        known = [known for known in self._option_string_actions if known.startswith("--")]
        near = difflib.get_close_matches(name, known, n=1) if name.startswith("--") else []
        if name == "-V":
            near = ["-v"]
        raise UsageError(
            f"unknown option {name}",
            f"did you mean {near[0]}?" if near else f"'{self.prog} --help' lists them all",
        )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=79)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(action.option_strings)
        if not names or action.nargs == 0:
            return names or super()._format_action_invocation(action)
        return f"{names} {self._format_args(action, action.dest.upper())}"


class _Refuse(argparse.Action):
    """A letter of the original that is understood and not taken."""

    def __init__(self, option_strings: list[str], dest: str, why: tuple[str, str]) -> None:
        super().__init__(option_strings, dest, nargs="?", help=argparse.SUPPRESS)
        self._why = why

    def __call__(self, *_: Any) -> NoReturn:
        what, instead = self._why
        raise UsageError(f"{self.option_strings[0]} ({what}) is not taken", instead)


def replay_parser() -> Parser:
    parser = Parser(
        "replay",
        "pycopy replay -x ONLINE-TARGET[,...] [options]",
        _REPLAY_ABOUT,
        _REPLAY_EPILOG,
    )
    what = parser.add_argument_group("what is copied")
    what.add_argument(
        "-x",
        "--copy",
        metavar="SPEC",
        help="[srcIP:]srcPort-dstIP:dstPort, comma separated; IPv6 in brackets; the first match"
        " wins; srcPort may be a range: as many target ports in a row, from dstPort on",
    )
    _add_interface(what)
    what.add_argument(
        "-F", "--filter", metavar="EXPR", help="only what this pcap-filter(7) expression takes"
    )
    what.add_argument("-r", "--sample", metavar="PERCENT", help="share of the clients (100)")
    what.add_argument(
        "-g", "--ramp", action="store_true", help="start at 1 percent, one more every second"
    )
    what.add_argument(
        "-O",
        "--full-sessions-only",
        action="store_true",
        help="only connections whose SYN was seen",
    )
    what.add_argument(
        "--forwarded",
        action="store_true",
        help="also what is not addressed to this host: on a gateway or a mirror port",
    )
    what.add_argument(
        "--hook", metavar="tc|xdp", help="tc (default) or xdp (attaching resets some NICs)"
    )

    what.add_argument(
        "--no-fastpath",
        action="store_true",
        help="every segment through user space, healthy sessions too",
    )
    what.add_argument(
        "--backlog",
        metavar="SIZE",
        help="kernel memory for what the fast path has sent and may have to repeat (64M)",
    )

    how = parser.add_argument_group("where responses are taken")
    how.add_argument(
        "-s",
        "--intercept",
        metavar="HOST[:PORT]",
        help="hosts where 'pycopy intercept' runs, comma separated; without: here",
    )
    how.add_argument(
        "-p",
        "--intercept-port",
        metavar="PORT",
        help=f"for -s entries without a port ({INTERCEPT_PORT})",
    )
    how.add_argument(
        "-c",
        "--clients",
        metavar="RANGES",
        help="with -s: map clients to 62.135.200.x, CIDR or addresses, comma separated",
    )
    how.add_argument(
        "--ports", metavar="A-B", help="without -s: local ports to use, outside the ephemeral range"
    )
    how.add_argument(
        "-L", "--lonely", action="store_true", help="start even if no intercept can be reached yet"
    )

    pace = parser.add_argument_group("pace and limits")
    pace.add_argument(
        "-W",
        "--no-wait",
        action="store_true",
        help="send requests as they come, without waiting for the target's answers",
    )
    pace.add_argument(
        "-t",
        "--response-timeout",
        metavar="S",
        help=f"give a session up when the target is silent for so long ({RESPONSE_IDLE_S})",
    )
    pace.add_argument(
        "-k",
        "--idle-timeout",
        metavar="S",
        help=f"the same with nothing left to send (-t plus {SESSION_IDLE_EXTRA_S})",
    )
    pace.add_argument(
        "-m",
        "--memory",
        metavar="MB",
        help="most memory for sessions (1024, or 64 for each of many workers)",
    )
    pace.add_argument("--max-sessions", metavar="N", help="most sessions at a time (65536)")
    pace.add_argument("-M", "--mtu", metavar="BYTES", help="towards the target (the route's)")
    pace.add_argument(
        "--allow-public-target",
        action="store_true",
        help="the target may be a public internet address",
    )
    pace.add_argument(
        "--workers",
        metavar="N|auto",
        help="processes among which the flows are spread (1); auto: one for each CPU",
    )
    _add_process(parser, "replay", "a 64th of this host's memory, 128M at most")
    for letter, why in REPLAY_REFUSED.items():
        parser.add_argument(letter, action=_Refuse, why=why)
    return parser


def intercept_parser() -> Parser:
    parser = Parser(
        "intercept",
        "pycopy intercept -i DEVICE -F EXPR [options]",
        _INTERCEPT_ABOUT,
        _INTERCEPT_EPILOG,
    )
    what = parser.add_argument_group("what is taken")
    _add_interface(what)
    what.add_argument(
        "-F",
        "--filter",
        metavar="EXPR",
        help="required: the target's responses, as pcap-filter(7)",
    )
    what.add_argument(
        "-x",
        "--pass",
        dest="pass_nets",
        action="append",
        metavar="RANGES",
        help="clients whose responses always pass: 10.1.0.x, CIDR or addresses",
    )
    what.add_argument(
        "--at", metavar="PLACE", help="this host is: target, assistant, auto (default)"
    )
    what.add_argument(
        "--hook",
        metavar="tc|xdp",
        help="on an assistant: tc (default) or xdp (every response over the channel)",
    )
    channel = parser.add_argument_group("replay connects to")
    channel.add_argument("-b", "--bind", metavar="ADDRESS", help="this address (all)")
    channel.add_argument("-p", "--port", metavar="PORT", help=f"this port ({INTERCEPT_PORT})")
    _add_process(parser, "intercept", "4M")
    for letter, why in INTERCEPT_REFUSED.items():
        parser.add_argument(letter, action=_Refuse, why=why)
    return parser


def lab_parser() -> Parser:
    about = """\
Builds hosts client, online, target and assistant in network namespaces, joined
by virtual links and separate from this machine's own network.

actions:
  up                     build it
  status                 say what is there
  exec ROLE COMMAND ...  run a command on one of its hosts
  shell ROLE             a shell on one of its hosts
  down                   remove it
"""
    usage = "pycopy lab [--name NAME] ACTION [ROLE [COMMAND ...]]"
    parser = Parser("lab", usage, about)
    parser.add_argument("--name", default="pycopy-lab", help="of the lab (pycopy-lab)")
    _add_help(parser)
    return parser


def demo_parser() -> Parser:
    about = """\
Builds a lab, starts a real nginx online and another as target, drives real
HTTP load, copies it live and ends with a table: served online, served by the
target, lost, and whether the ledger balances. Exit status 1 if any was lost.
"""
    parser = Parser("demo", "pycopy demo [options]", about, _EXITS)
    parser.add_argument(
        "--placement", metavar="PLACES", help="self, target, assistant, comma separated (all)"
    )
    parser.add_argument("--family", metavar="FAMILIES", help="4, 6, comma separated (both)")
    parser.add_argument("--requests", metavar="N", default="10007", help="for each row (10007)")
    parser.add_argument("--connections", metavar="N", default="1009", help="for each row (1009)")
    parser.add_argument("--json", action="store_true", help="the table as JSON, on stdout")
    _add_help(parser)
    return parser


def detach_parser() -> Parser:
    about = """\
On Linux 6.6 and later programs detach by themselves when their process ends,
kill -9 included. On older kernels this removes what a killed process left. It
touches nothing that is not pycopy's, and nothing that a running pycopy uses.
"""
    parser = Parser("detach", "pycopy detach [-i DEVICE[,...]]", about, _EXITS)
    _add_interface(parser)
    _add_help(parser)
    return parser


def bpf_parser() -> Parser:
    about = """\
pycopy ships its BPF programs compiled, the same for everybody; a host that
runs them needs no compiler.

actions:
  list     what there is, by which compiler, with digests
  verify   compile the sources again (with python3-bpfcc), compare the bytes
  load     load each into this kernel and take it out again: what its verifier
           says, and through how many instructions it goes (root)
  build    make them anew (with python3-bpfcc)
"""
    usage = "pycopy bpf [--output DIR] ACTION [OBJECT ...]"
    parser = Parser("bpf", usage, about, _EXITS)
    parser.add_argument(
        "--output", metavar="DIR", help="where the objects are, or are to be (with the sources)"
    )
    _add_help(parser)
    return parser


def _add_interface(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "-i", "--interface", metavar="DEVICES", help="network devices, comma separated (all)"
    )


def _add_process(parser: Parser, command: str, ring: str) -> None:
    group = parser.add_argument_group("the process and its reports")
    group.add_argument("-d", "--daemon", action="store_true", help="run in the background")
    group.add_argument(
        "-l",
        "--log",
        metavar="FILE",
        help=f"messages go here (stderr; as a daemon /var/log/pycopy-{command}.log)",
    )
    group.add_argument("-P", "--pid-file", metavar="FILE", help="write the process id here")
    group.add_argument("--json", action="store_true", help="JSON lines on stdout, the summary last")
    group.add_argument(
        "--interval", metavar="S", help="seconds between report lines (10), off a terminal"
    )
    group.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="nothing but the ready line, warnings and the summary",
    )
    group.add_argument("--ring", metavar="SIZE", help=f"size of the kernel's ring buffer ({ring})")
    group.add_argument(
        "--transport",
        metavar="ring|perf",
        help="records come by a BPF ring buffer (default), or by perf ring buffers of each CPU",
    )
    _add_help(group)


def _add_help(group: argparse._ActionsContainer) -> None:
    group.add_argument("-h", "--help", action="help", help="this text")
    group.add_argument(
        "-v",
        "--version",
        action="version",
        version=f"pycopy {__version__}",
        help="the version",
    )


def top_help() -> str:
    commands = "\n".join(f"  {name:<11}{about}" for name, about in COMMANDS.items())
    return TOP_HELP.format(commands=commands)
