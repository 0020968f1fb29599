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
from pycopy.command.config import InterceptConfig, ProcessConfig, ReplayConfig
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

PLACEMENTS = ("self", "target", "assistant")
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


def replay_config(argv: Sequence[str], resolver: values.Resolver = values.resolve) -> ReplayConfig:
    """The configuration that the words after ``pycopy replay`` ask for."""
    given, words = options.replay_parser().parse(argv)
    if given.copy is not None and words:
        _no_words(words if given.filter else [], _QUOTE)
        raise UsageError(
            f"unexpected argument: {words[0]!r}",
            "with -x every service is in one word: -x 80-10.0.0.2:8080,81-10.0.0.2:8081",
        )
    if given.copy is None and not words:
        raise UsageError("-x is missing", "name what is copied: -x 80-10.0.0.2:8080")
    wanted = ReplayConfig()
    if given.copy is not None:
        wanted.services = services.parse_services(given.copy, resolver)
    else:
        wanted.services = services.parse_old_form(words, resolver)
    port = values.INTERCEPT_PORT
    if given.intercept_port is not None:
        _needs_intercept(given, "-p")
        port = values.parse_int(given.intercept_port, "-p", 1, 65535, "the port")
    if given.intercept is not None:
        wanted.intercepts = values.parse_intercepts(given.intercept, port, resolver)
    if given.clients is not None:
        _needs_intercept(given, "-c")
        wanted.client_pool = values.parse_networks(given.clients, "-c")
        services.check_client_pool(wanted.client_pool, wanted.services)
    if given.ports is not None:
        if given.intercept is not None:
            raise UsageError("--ports has no meaning with -s", "leave one of the two out")
        wanted.self_ports = values.parse_ports(given.ports)
        services.check_ports(wanted.self_ports, wanted.services)
    if given.hook is not None:
        wanted.hook = _choice(given.hook, "--hook", ("tc", "xdp"))
    _numbers(given, wanted)
    wanted.wait_for_response = not given.no_wait
    wanted.only_full_sessions = given.full_sessions_only
    wanted.ramp = given.ramp
    wanted.forwarded = given.forwarded
    wanted.fastpath = not given.no_fastpath
    if given.backlog is not None:
        wanted.backlog_bytes = values.parse_bytes(given.backlog, "--backlog")
    wanted.lonely = given.lonely
    wanted.allow_public_target = given.allow_public_target
    if given.workers is not None:
        wanted.workers = _workers(
            given.workers, shares.MOST if wanted.intercepts else shares.MOST_ALONE
        )
        shares.check(wanted, memory_given=given.memory is not None)
        wanted.ring_bytes = config.default_ring_bytes(wanted.workers)
    _process(given, wanted, "replay")
    return wanted


def intercept_config(argv: Sequence[str]) -> InterceptConfig:
    """The configuration that the words after ``pycopy intercept`` ask for."""
    given, words = options.intercept_parser().parse(argv)
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
    wanted = InterceptConfig()
    if given.at is not None:
        wanted.placement = _choice(given.at, "--at", ("auto", "target", "assistant"))
    if given.hook is not None:
        wanted.hook = _choice(given.hook, "--hook", ("tc", "xdp"))
    if given.bind is not None:
        wanted.bind = values.parse_bind(given.bind)
    if given.port is not None:
        wanted.port = values.parse_int(given.port, "-p", 1, 65535, "the port")
    for ranges in given.pass_nets or ():
        wanted.pass_nets += values.parse_networks(ranges, "--pass")
    _process(given, wanted, "intercept")
    return wanted


def _numbers(given: argparse.Namespace, wanted: ReplayConfig) -> None:
    parse = values.parse_int
    if given.sample is not None:
        share = given.sample.removesuffix("%")
        wanted.sample_percent = parse(share, "-r", 1, 100, "the percentage")
    if given.response_timeout is not None:
        wanted.response_idle_s = parse(given.response_timeout, "-t", 1, 86400, "seconds")
        wanted.session_idle_s = wanted.response_idle_s + config.SESSION_IDLE_EXTRA_S
    if given.idle_timeout is not None:
        wanted.session_idle_s = parse(given.idle_timeout, "-k", 1, 7 * 86400, "seconds")
    if given.memory is not None:
        wanted.memory_mb = parse(given.memory, "-m", 16, 1 << 20, "megabytes")
    if given.max_sessions is not None:
        wanted.max_sessions = parse(given.max_sessions, "--max-sessions", 1, 1 << 24, "sessions")
    if given.mtu is not None:
        wanted.mtu = parse(given.mtu, "-M", 576, 65535, "the MTU")


def _workers(text: str, most: int) -> int:
    if text == "auto":
        return min(len(os.sched_getaffinity(0)), most)
    return values.parse_int(text, "--workers", 1, most, "the number of processes")


def _process(given: argparse.Namespace, wanted: ProcessConfig, command: str) -> None:
    if given.interface is not None:
        wanted.interfaces = values.parse_interfaces(given.interface)
    wanted.filter = given.filter or ""
    wanted.daemon = given.daemon
    wanted.log_path = given.log or (f"/var/log/pycopy-{command}.log" if given.daemon else "")
    wanted.pid_path = given.pid_file or ""
    wanted.json = given.json
    wanted.quiet = given.quiet
    if given.interval is not None:
        wanted.interval_s = values.parse_interval(given.interval)
    if given.ring is not None:
        wanted.ring_bytes = values.parse_bytes(given.ring, "--ring")
    if given.transport is not None:
        wanted.transport = _choice(given.transport, "--transport", ("ring", "perf"))


def _replay(argv: list[str]) -> int:
    wanted = replay_config(argv)
    guards.check_interfaces(wanted.interfaces)
    local = devices.local_addresses()
    guards.check_targets(wanted.services, local, wanted.allow_public_target)
    privileges.check_privileges()

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
    given, words = options.lab_parser().parse(argv[:cut])
    command = argv[cut:]
    actions = ("up", "status", "down", "exec", "shell")
    if not words:
        raise UsageError("the action is missing", f"one of: {', '.join(actions)}")
    action = _choice(words[0], "the action", actions)
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

    return lab.command(action, role, command, given.name)


def _demo(argv: list[str]) -> int:
    given, words = options.demo_parser().parse(argv)
    _no_words(words)
    placements = list(PLACEMENTS)
    if given.placement is not None:
        placements = [
            _choice(word, "--placement", PLACEMENTS) for word in given.placement.split(",")
        ]
    families = [4, 6]
    if given.family is not None:
        families = [int(_choice(word, "--family", ("4", "6"))) for word in given.family.split(",")]
    requests = values.parse_int(given.requests, "--requests", 1, 10**9, "requests")
    connections = values.parse_int(given.connections, "--connections", 1, 10**9, "connections")
    if connections > requests:
        raise UsageError(
            f"--connections {connections} is more than --requests {requests}",
            "every connection carries at least one request",
        )
    from pycopy.lab import demo

    return demo.run(placements, families, requests, connections, given.json)


def _detach(argv: list[str]) -> int:
    given, words = options.detach_parser().parse(argv)
    _no_words(words)
    names = None if given.interface is None else values.parse_interfaces(given.interface) or None
    guards.check_interfaces(names or [])
    privileges.check_privileges()

    removed = detach_leftovers(names)
    for line in removed:
        print(line)
    if not removed:
        _to_stderr("nothing of pycopy's was left attached\n")
    return EXIT_OK


def _bpf(argv: list[str]) -> int:
    from pathlib import Path

    from pycopy.command import bpf
    from pycopy.kernel import objects

    given, words = options.bpf_parser().parse(argv)
    if not words:
        raise UsageError("the action is missing", f"one of: {', '.join(bpf.ACTIONS)}")
    action = _choice(words[0], "the action", bpf.ACTIONS)
    names = [_choice(word, "the object", list(objects.CATALOGUE)) for word in words[1:]]
    if action == "load":
        privileges.check_privileges()
    return bpf.run(action, Path(given.output) if given.output else None, names)


def _needs_intercept(given: argparse.Namespace, option: str) -> None:
    if given.intercept is None:
        raise UsageError(
            f"{option} has no meaning without -s",
            "without -s copies leave under this host's own address; add -s HOST, or leave"
            f" {option} out",
        )


def _choice(word: str, option: str, choices: Sequence[str]) -> str:
    if word not in choices:
        near = difflib.get_close_matches(word, choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(choices)}"
        raise UsageError(f"{option}: {word!r} is not known", hint)
    return word


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
