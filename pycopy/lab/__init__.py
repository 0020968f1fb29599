"""``pycopy lab``: hosts in network namespaces, to try pycopy out and to test it.

:mod:`topology` builds the hosts, :mod:`servers` puts servers on them,
:mod:`load` is the clients, :mod:`copying` runs pycopy itself between them. Nothing here
is imported by replay or intercept, and nothing heavy is imported before it is needed.

Tests: tests/lab/test_lab.py
"""

import os
import shutil
import sys
from typing import TYPE_CHECKING

from pycopy.errors import PycopyError, UsageError

if TYPE_CHECKING:
    from .topology import Lab

ACTIONS = ("up", "shell", "exec", "status", "down")

#: As shells have it: a command that cannot be run, and one that is not there.
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


def command(action: str, role: str | None, argv: list[str], name: str) -> int:
    """``pycopy lab ACTION [ROLE] [-- CMD]`` on the lab called ``name``; the exit status.

    Raises PycopyError.
    """
    from . import topology

    lab = topology.Lab(name)
    topology.require_root()
    if action == "up":
        lab.up()
        _describe(lab)
        return 0
    if not lab.is_built():
        there = topology.names()
        cure = f"there is: {', '.join(there)}" if there else f"build it: {lab.command('up')}"
        raise PycopyError(f"there is no lab named {name}", cure)
    if action == "down":
        if lab.is_here():
            raise PycopyError(
                f"this is a host of {name}, which cannot remove the lab around it", "leave it: exit"
            )
        for line in lab.down():
            print(f"removed {line}", file=sys.stderr)
        return 0
    if action == "status":
        _describe(lab)
        return 0
    role = role or "client"
    if role not in lab.roles:
        raise UsageError(f"the lab has no host {role!r}", f"one of: {', '.join(lab.roles)}")
    if action == "shell":
        argv = [os.environ.get("SHELL", "/bin/sh")]
        print(f"{role} of {name}: leave with exit", file=sys.stderr)
    elif action != "exec":
        raise UsageError(f"no such action: lab {action}", f"one of: {', '.join(ACTIONS)}")
    elif not argv:
        raise UsageError("nothing to run", f"{lab.command('exec')} ROLE -- COMMAND [ARGUMENT...]")
    _check_command(argv[0])
    return lab.replace_self(role, argv)


def _check_command(name: str) -> None:
    """``ip netns exec`` says 1 or 255 for these, which may as well be the command's own."""
    if shutil.which(name):
        return
    if "/" in name and os.path.exists(name):
        error = PycopyError(f"{name} is not an executable file", "name a command")
        error.exit_status = EXIT_NOT_EXECUTABLE
    else:
        error = PycopyError(f"there is no command {name}", "install it, or give its whole path")
        error.exit_status = EXIT_NOT_FOUND
    raise error


def _describe(lab: "Lab") -> None:
    for role in lab.roles:
        addresses = " ".join(lab.address(role, family) for family in (4, 6))
        print(f"{role:<10} {lab.namespace(role):<24} {addresses}")
