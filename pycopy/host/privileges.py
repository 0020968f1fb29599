"""What this process may do: the capabilities that pycopy needs, and whether it has them.

Tests: tests/unit/test_guards.py, tests/lab/test_rights.py
"""

from collections.abc import Mapping

from pycopy.errors import HostUnfit

#: What replay needs, by their numbers (linux/capability.h).
SENDING = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_PERFMON": 38, "CAP_BPF": 39}
#: What it takes to load BPF programs and attach them, without sending: what intercept needs.
LOADING = {name: number for name, number in SENDING.items() if name != "CAP_NET_RAW"}
_CAP_SYS_ADMIN = 21


def cure(needed: Mapping[str, int] = LOADING) -> str:
    """What to type, to have the capabilities of ``needed``."""
    return f"run it with sudo, or from a systemd unit with AmbientCapabilities={' '.join(needed)}"


def effective_capabilities() -> int:
    """The effective capabilities of this process, bit n for number n (capabilities(7))."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def check_privileges(needed: Mapping[str, int] = LOADING, effective: int | None = None) -> None:
    """HostUnfit if this process lacks one of ``needed``, LOADING or SENDING."""
    held = effective_capabilities() if effective is None else effective
    if held & 1 << _CAP_SYS_ADMIN:
        # Both were split off it (Linux 5.8), and it includes them ever since.
        held |= 1 << LOADING["CAP_BPF"] | 1 << LOADING["CAP_PERFMON"]
    missing = [name for name, bit in needed.items() if not held & 1 << bit]
    if missing:
        raise HostUnfit(
            f"not enough privilege: {', '.join(missing)} missing",
            cure(needed),
        )
