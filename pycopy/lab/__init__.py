"""``pycopy lab``: hosts in network namespaces, to try pycopy out and to test it.

:mod:`topology` builds the hosts, :mod:`servers` and :mod:`exact` put servers on them,
:mod:`load` is the clients, :mod:`copying` runs pycopy itself between them. Nothing here
is imported by replay or intercept, and nothing heavy is imported before it is needed.
"""

import os
import sys
from typing import TYPE_CHECKING

from pycopy.errors import PycopyError, UsageError

if TYPE_CHECKING:
    from .topology import Lab

ACTIONS = ("up", "shell", "exec", "status", "down")


def command(action: str, role: str | None, argv: list[str], name: str) -> int:
    """``pycopy lab ACTION [ROLE] [-- CMD]`` on the lab called ``name``; the exit status."""
    from .topology import Lab, require_root

    require_root()
    lab = Lab(name)
    if action == "up":
        lab.up()
        _describe(lab)
        return 0
    if action == "down":
        for line in lab.down():
            print(f"removed {line}", file=sys.stderr)
        return 0
    if not lab.exists():
        raise PycopyError(f"there is no lab named {name}", "build it: pycopy lab up")
    if action == "status":
        _describe(lab)
        return 0
    role = role or "client"
    if role not in lab.roles:
        raise UsageError(f"the lab has no {role}", f"one of: {', '.join(lab.roles)}")
    if action == "shell":
        argv = [os.environ.get("SHELL", "/bin/sh")]
        print(f"{role} of {name}: leave with exit", file=sys.stderr)
    elif action != "exec":
        raise UsageError(f"no such action: lab {action}", f"one of: {', '.join(ACTIONS)}")
    elif not argv:
        raise UsageError("nothing to run", "pycopy lab exec ROLE -- COMMAND [ARGUMENT...]")
    return lab.replace_self(role, argv)


def _describe(lab: "Lab") -> None:
    for role in lab.roles:
        addresses = " ".join(lab.address(role, family) for family in (4, 6))
        print(f"{role:<10} {lab.namespace(role):<24} {addresses}")
