"""The command ``pycopy``: from words to a configuration, to a driver, to an exit status.

Nothing heavy is imported before it is known which driver runs. All errors that reach the
user pass through :func:`main` and look alike: cause, cure, exit status.
"""

import argparse
import contextlib
import difflib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from pycopy import __version__
from pycopy.command import config, guards, options, services, values
from pycopy.command.config import (
    BpfConfig,
    DemoConfig,
    DetachConfig,
    InterceptConfig,
    LabConfig,
    ProcessConfig,
    ReplayConfig,
)
from pycopy.command.declare import fill
from pycopy.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    UsageError,
    explain,
)
from pycopy.host import devices, privileges
from pycopy.kernel.attach import detach_leftovers
from pycopy.process import console, daemon
from pycopy.workers import shares

_QUOTE = "quote an expression: -F 'tcp ...'"


def main(argv: Sequence[str]) -> int:
    """Run one command line and give its exit status; never raises what a user, or the host
    it runs on, can cause."""
    try:
        status = _dispatch(list(argv))
        options.tell("")
        return status
    except KeyboardInterrupt:
        _to_stderr("pycopy: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_FAILED  # whoever read our stdout has gone
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        cure = f"\n  {known.cure}" if known.cure else ""
        _to_stderr(f"pycopy: error: {known.cause}{cure}\n")
        return known.exit_status


def script() -> NoReturn:
    """The whole process; see __main__.py for what comes before."""
    _open_standard_streams()
    try:
        status = main(sys.argv[1:])
    except Exception:
        status = EXIT_FAILED
        _to_stderr(traceback.format_exc())
        _to_stderr("pycopy: this is a bug in pycopy; please report it with the lines above\n")
    console.leave(status)


def _open_standard_streams() -> None:
    """Whoever started us may have closed one: the next file opened would get its number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            _open_nothing()  # the lowest number that is free: fd
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _open_nothing() -> None:
    with contextlib.suppress(OSError):
        os.open(os.devnull, os.O_RDWR)
        return
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()  # without a peer: as good


def _dispatch(argv: list[str]) -> int:
    if not argv:
        _to_stderr(options.top_help())
        return EXIT_USAGE
    if argv[0] == "help" and len(argv) > 1:
        argv = [argv[1], "--help"]
    if argv[0] in ("-h", "--help", "help"):
        options.tell(options.top_help())
        return EXIT_OK
    if argv[0] in ("-v", "--version"):
        options.tell(f"pycopy {__version__}\n")
        return EXIT_OK
    command = _COMMANDS.get(argv[0])
    if command is None:
        near = difflib.get_close_matches(argv[0], _COMMANDS, n=1)
        known = f"did you mean {near[0]}?" if near else f"one of: {', '.join(_COMMANDS)}"
        if argv[0] == "-V":
            known = "did you mean -v?"
        elif argv[0].startswith("-"):
            known = f"options follow the command, for example: pycopy replay {argv[0]} ..."
        raise UsageError(f"unknown command {argv[0]!r}", known)
    try:
        return command(argv[1:])
    except SystemExit as end:  # argparse after --help and --version
        return int(end.code or EXIT_OK)


def replay_config(argv: Sequence[str]) -> ReplayConfig:
    """The configuration that the words after ``pycopy replay`` ask for."""
    given, words = options.parser("replay").parse(argv)
    if given.services is not None and words:
        _no_words(words if given.filter else [], _QUOTE)
        raise UsageError(
            f"unexpected argument: {words[0]!r}",
            "with -x every service is in one word: -x 80-10.0.0.2:8080,81-10.0.0.2:8081",
        )
    if given.services is None and not words:
        raise UsageError("-x is missing", "name what is copied: -x 80-10.0.0.2:8080")
    _check_company(given)
    wanted = fill(ReplayConfig(), given)
    if words:
        wanted.services = services.parse_old_form(words)
    if given.intercepts is not None:
        wanted.intercepts = values.parse_intercepts(given.intercepts, wanted.intercept_port)
    services.check_client_pool(wanted.client_pool, wanted.services)
    if wanted.self_ports is not None:
        services.check_ports(wanted.self_ports, wanted.services)
    if given.session_idle_s is None:
        wanted.session_idle_s = wanted.response_idle_s + config.SESSION_IDLE_EXTRA_S
    if given.workers is not None:
        _share(given, wanted)
    _default_log(wanted, "replay")
    return wanted


def intercept_config(argv: Sequence[str]) -> InterceptConfig:
    """The configuration that the words after ``pycopy intercept`` ask for."""
    given, words = options.parser("intercept").parse(argv)
    if words and given.quiet and words[0].isdigit():
        raise UsageError(
            f"-q takes no number here: {words[0]!r}",
            "-q is --quiet; there is no nfqueue whose length could be set",
        )
    _no_words(words, _QUOTE)
    if not given.filter:
        raise UsageError(
            "-F is missing", "say which responses are the target's: -F 'tcp and src port 8080'"
        )
    wanted = fill(InterceptConfig(), given)
    _default_log(wanted, "intercept")
    return wanted


def _check_company(given: argparse.Namespace) -> None:
    """Refuse options that mean nothing with, or without, -s."""
    for option, typed in (("-p", given.intercept_port), ("-c", given.client_pool)):
        if typed is not None and given.intercepts is None:
            raise UsageError(
                f"{option} has no meaning without -s",
                "without -s copies leave under this host's own address; add -s HOST, or leave"
                f" {option} out",
            )
    if given.self_ports is not None and given.intercepts is not None:
        raise UsageError("--ports has no meaning with -s", "leave one of the two out")


def _share(given: argparse.Namespace, wanted: ReplayConfig) -> None:
    """Settle what --workers changes, and refuse what cannot be shared."""
    most = shares.MOST if wanted.intercepts else shares.MOST_ALONE
    if given.workers == "auto":
        wanted.workers = min(len(os.sched_getaffinity(0)), most)
    else:
        wanted.workers = values.parse_int(
            given.workers, "--workers", 1, most, "the number of processes"
        )
    if given.memory_mb is None:
        wanted.memory_mb = max(wanted.memory_mb, config.WORKER_MEMORY_MB * wanted.workers)
    if given.ring_bytes is None:
        wanted.ring_bytes = config.default_ring_bytes(wanted.workers)
    shares.check(wanted)


def _default_log(wanted: ProcessConfig, command: str) -> None:
    """A daemon has no stderr that anybody reads."""
    if wanted.daemon and not wanted.log_path:
        wanted.log_path = config.DAEMON_LOG.format(command=command)


def _replay(argv: list[str]) -> int:
    wanted = replay_config(argv)
    guards.check_interfaces(wanted.interfaces)
    local = devices.local_addresses()
    guards.check_targets(wanted.services, local, wanted.allow_public_target)
    privileges.check_privileges(privileges.SENDING)

    def body() -> int:
        warnings = [] if wanted.forwarded else guards.foreign_sources(wanted.services, local)
        words = [f"pycopy: warning: {warning}" for warning in warnings]
        if wanted.workers > 1:
            from pycopy.workers import master

            return master.run(wanted, words)
        from pycopy import replay

        for line in words:
            console.say(line)
        return replay.run(wanted)

    return _run(body, wanted)


def _intercept(argv: list[str]) -> int:
    wanted = intercept_config(argv)
    guards.check_interfaces(wanted.interfaces)
    privileges.check_privileges()

    def body() -> int:
        from pycopy import intercept

        return intercept.run(wanted)

    return _run(body, wanted)


def _run(body: Callable[[], int], wanted: ProcessConfig) -> int:
    return daemon.run(
        body, detach=wanted.daemon, log_path=wanted.log_path, pid_path=wanted.pid_path
    )


def _lab(argv: list[str]) -> int:
    # What follows exec ROLE is another program's: none of its options are ours.
    cut = next((i + 2 for i, word in enumerate(argv) if word in ("exec", "shell")), len(argv))
    given, words = options.parser("lab").parse(argv[:cut])
    command = argv[cut:]
    actions = ("up", "status", "down", "exec", "shell")
    if not words:
        raise UsageError("the action is missing", f"one of: {', '.join(actions)}")
    action = values.choose(words[0], "the action", actions)
    role = words[1] if len(words) > 1 else None
    if action in ("exec", "shell"):
        if role is None:
            raise UsageError(f"{action}: which host?", f"for example: pycopy lab {action} online")
        if command[:1] == ["--"]:
            command = command[1:]
        if bool(command) != (action == "exec"):
            raise UsageError(
                f"{action}: {'which command?' if action == 'exec' else 'takes no command'}",
                f"for example: pycopy lab exec {role} ip route",
            )
    else:
        _no_words(words[1:])
    from pycopy import lab

    return lab.command(action, role, command, fill(LabConfig(), given).name)


def _demo(argv: list[str]) -> int:
    given, words = options.parser("demo").parse(argv)
    _no_words(words)
    wanted = fill(DemoConfig(), given)
    if wanted.connections > wanted.requests:
        raise UsageError(
            f"--connections {wanted.connections} is more than --requests {wanted.requests}",
            "every connection carries at least one request",
        )
    from pycopy.lab import demo

    families = [int(family) for family in wanted.families]
    return demo.run(wanted.placements, families, wanted.requests, wanted.connections, wanted.json)


def _detach(argv: list[str]) -> int:
    given, words = options.parser("detach").parse(argv)
    _no_words(words)
    names = fill(DetachConfig(), given).interfaces
    guards.check_interfaces(names)
    privileges.check_privileges()

    removed = detach_leftovers(names or None)
    for line in removed:
        print(line)
    if not removed:
        _to_stderr("nothing of pycopy's was left attached\n")
    return EXIT_OK


def _bpf(argv: list[str]) -> int:
    from pathlib import Path

    from pycopy.command import bpf
    from pycopy.kernel import objects

    given, words = options.parser("bpf").parse(argv)
    if not words:
        raise UsageError("the action is missing", f"one of: {', '.join(bpf.ACTIONS)}")
    action = values.choose(words[0], "the action", bpf.ACTIONS)
    names = [values.choose(word, "the object", list(objects.CATALOGUE)) for word in words[1:]]
    if action == "load":
        privileges.check_privileges()
    output = fill(BpfConfig(), given).output
    return bpf.run(action, Path(output) if output else None, names)


def _no_words(words: Sequence[str], cure: str = "leave it out") -> None:
    if words:
        raise UsageError(f"unexpected argument: {words[0]!r}", cure)


def _to_stderr(text: str) -> None:
    console.put(text)
    console.flush()  # if nobody reads it, the exit status says it


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "replay": _replay,
    "intercept": _intercept,
    "lab": _lab,
    "demo": _demo,
    "detach": _detach,
    "bpf": _bpf,
}
