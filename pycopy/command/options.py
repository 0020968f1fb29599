"""The argument trees of the commands, from their tables, and what their help says around them.

A letter of the originals that pycopy does not take is answered with the reason. Only argparse
here: what there is to type is in config.py, no value is judged (values.py), nothing is run
(cli.py).

Tests: tests/unit/test_cli.py
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pycopy import __version__
from pycopy.command import config
from pycopy.command.declare import HELP, VERSION, Configuration, Group, Option, options_of
from pycopy.errors import PycopyError, UsageError

_EXITS = """\
exit status:
  0  done, also after SIGINT or SIGTERM     3  this host is unfit
  1  failed at run time                     4  refused by a safety guard
  2  wrong usage                          130  interrupted before it was ready,
                                               or by a second signal
"""

_SIGNALS = """\
signals:
  INT, TERM  drain, then exit; a second signal exits at once
  HUP        reopen the log file (-l)        USR1  print the ledger
"""

TOP_HELP = f"""\
usage: pycopy COMMAND [options]     see 'pycopy COMMAND --help'

Copies the live TCP traffic of an online server to a target server: each client
connection is replayed as a real connection to the target. Production is never
delayed or changed, real clients never see a response to a copy, and every lost
segment is counted.

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
ever sees one, and tells 'pycopy replay' how far the target has come. The
command is the same on the target and on an assistant that the target's
responses are routed to.
"""

_INTERCEPT_EPILOG = f"""\
examples:
  pycopy intercept -i eth0 -F 'tcp and src port 8080'
      on the target: no route needed. On an assistant: the target needs a route
      such as: ip route add 62.135.200.0/24 via ASSISTANT
  pycopy intercept -i eth0 -F 'tcp and src port 8080' -x 10.1.0.0/16 -d
      responses to 10.1.0.0/16 are real clients' and pass, as a daemon
  pycopy intercept -i eth0 -F 'tcp and src port 8080' -b 10.0.0.2 -p 40000
      listen for replay on one address and another port

{_EXITS}
{_SIGNALS}"""

_LAB_ABOUT = """\
Builds hosts client, online, target and assistant in network namespaces, joined
by virtual links and separate from this machine's own network.

actions:
  up                     build it
  status                 say what is there
  exec ROLE COMMAND ...  run a command on one of its hosts
  shell ROLE             a shell on one of its hosts
  down                   remove it
"""

_DEMO_ABOUT = """\
Builds a lab, starts a real nginx online and another as target, drives real
HTTP load, copies it live and ends with a table: served online, served by the
target, lost, and whether the ledger balances. Exit status 1 if any was lost.
"""

_DETACH_ABOUT = """\
On Linux 6.6 and later programs detach by themselves when their process ends,
kill -9 included. On older kernels this removes what a killed process left. It
touches nothing that is not pycopy's, and nothing that a running pycopy uses.
"""

_BPF_ABOUT = """\
pycopy ships its BPF programs compiled, the same for everybody; a host that
runs them needs no compiler.

actions:
  list     what there is, by which compiler, with digests
  verify   compile the sources again (with python3-bpfcc), compare the bytes
  load     load each into this kernel and take it out again: what its verifier
           says, and through how many instructions it goes (root)
  build    make them anew (with python3-bpfcc)
"""


@dataclass(frozen=True)
class Command:
    """One command: its table, and the words around it in the help."""

    summary: str
    config: type[Configuration]
    usage: str
    about: str
    epilog: str = ""


COMMANDS = {
    "replay": Command(
        "copy this host's traffic to a target server (online host)",
        config.ReplayConfig,
        "-x ONLINE-TARGET[,...] [options]",
        _REPLAY_ABOUT,
        _REPLAY_EPILOG,
    ),
    "intercept": Command(
        "take the target's responses back to replay (target or assistant)",
        config.InterceptConfig,
        "-i DEVICE -F EXPR [options]",
        _INTERCEPT_ABOUT,
        _INTERCEPT_EPILOG,
    ),
    "lab": Command(
        "hosts in network namespaces, to try things out",
        config.LabConfig,
        "[--name NAME] ACTION [ROLE [COMMAND ...]]",
        _LAB_ABOUT,
    ),
    "demo": Command(
        "copy real traffic between real servers in a lab, and count",
        config.DemoConfig,
        "[options]",
        _DEMO_ABOUT,
        _EXITS,
    ),
    "detach": Command(
        "remove what an older kernel left attached after a crash",
        config.DetachConfig,
        "[-i DEVICE[,...]]",
        _DETACH_ABOUT,
        _EXITS,
    ),
    "bpf": Command(
        "show, verify or make anew the compiled BPF programs",
        config.BpfConfig,
        "[--output DIR] ACTION [OBJECT ...]",
        _BPF_ABOUT,
        _EXITS,
    ),
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

    def __init__(self, name: str, command: Command) -> None:
        super().__init__(
            prog=f"pycopy {name}",
            usage=f"pycopy {name} {command.usage}",
            description=command.about,
            epilog=command.epilog,
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

    def __init__(self, option_strings: list[str], dest: str, row: Option) -> None:
        super().__init__(option_strings, dest, nargs="?", help=argparse.SUPPRESS)
        self._row = row

    def __call__(self, *_: Any) -> NoReturn:
        raise UsageError(f"{self._row.letter} ({self._row.was}) is not taken", self._row.instead)


def parser(name: str) -> Parser:
    """The parser of ``pycopy name``. What it gives has each option under its field's name: the
    text, a list of texts if the option is repeated, True for a flag, None where none was typed."""
    command = COMMANDS[name]
    tree = Parser(name, command)
    groups: dict[Group, argparse._ActionsContainer] = {Group.ALONE: tree}
    for row in options_of(command.config):
        if row.group not in groups:
            groups[row.group] = tree.add_argument_group(row.group.value)
        _add(groups[row.group], row, name)
    last = groups.get(Group.PROCESS, tree)
    last.add_argument(HELP.letter, HELP.long, action="help", help=HELP.help)
    last.add_argument(
        VERSION.letter,
        VERSION.long,
        action="version",
        version=f"pycopy {__version__}",
        help=VERSION.help,
    )
    for row in command.config.refused:
        tree.add_argument(row.letter, action=_Refuse, row=row)
    return tree


def _add(group: argparse._ActionsContainer, row: Option, command: str) -> None:
    names = [name for name in (row.letter, row.long) if name]
    text = row.help_text(command)
    if not row.metavar:
        group.add_argument(*names, dest=row.field, action="store_const", const=True, help=text)
    else:
        action = "append" if row.repeated else "store"
        group.add_argument(*names, dest=row.field, metavar=row.metavar, action=action, help=text)


def top_help() -> str:
    commands = "\n".join(f"  {name:<11}{command.summary}" for name, command in COMMANDS.items())
    return TOP_HELP.format(commands=commands)
