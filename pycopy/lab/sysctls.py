"""Kernel settings of the lab's hosts; they are per network namespace.

Tests: tests/lab/test_lab.py
"""

from collections.abc import Mapping
from pathlib import Path

#: Reverse path filters drop copies that carry a client's address, redirects would lead the
#: target's responses past the assistant, and router and address noise costs determinism.
HOST = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/accept_redirects": "0",
    "net/ipv4/conf/default/accept_redirects": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv4/ip_forward": "0",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv6/conf/all/accept_redirects": "0",
    "net/ipv6/conf/default/accept_redirects": "0",
    "net/ipv6/conf/default/autoconf": "0",
    "net/ipv6/conf/default/router_solicitations": "0",
    "net/ipv4/tcp_max_syn_backlog": "8192",
    "net/core/somaxconn": "8192",
}


def write(values: Mapping[str, str]) -> None:
    """Set them in the current network namespace; keys are paths below /proc/sys."""
    for key, value in values.items():
        path = Path("/proc/sys", key)
        # Kernels differ in which of these are per namespace; a missing one is not fatal.
        if path.exists():
            path.write_text(value, encoding="ascii")
