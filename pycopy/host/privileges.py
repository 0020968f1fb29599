"""What this process may do: the capabilities that pycopy needs, and whether it has them.

Tests: tests/unit/test_guards.py, tests/lab/test_rights.py
"""

from pycopy.errors import HostUnfit

#: All that are needed, by their numbers (linux/capability.h).
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_PERFMON": 38, "CAP_BPF": 39}
_CAP_SYS_ADMIN = 21

#: Whom the kernel lets do all that pycopy does.
PRIVILEGES_CURE = (
    f"run it with sudo, or from a systemd unit with AmbientCapabilities={' '.join(CAPABILITIES)}"
)


def effective_capabilities() -> int:
    """The effective capabilities of this process, bit n for number n (capabilities(7))."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def check_privileges(effective: int | None = None) -> None:
    """Whether this process may load BPF programs, attach them, and send frames, or HostUnfit."""
    held = effective_capabilities() if effective is None else effective
    if held & 1 << _CAP_SYS_ADMIN:
        # Both were split off it (Linux 5.8), and it includes them ever since.
        held |= 1 << CAPABILITIES["CAP_BPF"] | 1 << CAPABILITIES["CAP_PERFMON"]
    missing = [name for name, bit in CAPABILITIES.items() if not held & 1 << bit]
    if missing:
        raise HostUnfit(
            f"not enough privilege: {', '.join(missing)} missing",
            PRIVILEGES_CURE,
        )
