"""The lab: five or more network namespaces on one bridge, for tests and for trying pycopy out.

Every role has an interface ``eth0`` and address prefixes of its own, and reaches all other
prefixes on-link. So the target can be told to route the clients' prefix through the
assistant, as on real sites, while nothing else changes. All devices live inside the
namespaces: the host's own network is not touched, and two labs of different names never
meet. Knows nothing of what runs inside, except the processes started through it, which it
ends before the namespaces go.
"""

import contextlib
import ctypes
import ipaddress
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Self

from pycopy.errors import HostUnfit, PycopyError

from . import offloads as _offloads

DEFAULT_NAME = "pycopy-lab"
ROLES = ("client", "online", "target", "assistant")
EXTRA_ROLES = ("online2",)
SWITCH = "switch"
DEVICE = "eth0"

#: Third group of a role's prefixes: 10.91.N.0/24 and fd00:91:N::/64.
_NUMBERS = {"client": 1, "online": 2, "target": 3, "assistant": 4, "online2": 5}
_FIRST_HOST = 10
CLIENT_ADDRESSES = 64

_STATE_DIR = Path("/run/pycopy-lab")
_NETNS_DIR = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_SCOPE_LINK = 253
_PR_SET_PDEATHSIG = 1

#: Reverse path filters drop copies that carry a client's address, redirects would lead the
#: target's responses past the assistant, and router and address noise costs determinism.
_SYSCTLS = {
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

_libc = ctypes.CDLL(None, use_errno=True)


def _setns(fd: int) -> None:
    # os.setns exists from Python 3.12 only.
    if _libc.setns(fd, _CLONE_NEWNET) < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"setns: {os.strerror(errno)}")


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def require_root() -> None:
    """Namespaces need CAP_SYS_ADMIN; say so before half a lab stands."""
    if os.geteuid() != 0:
        raise HostUnfit(
            "the lab makes network namespaces, which needs root", "run it again with sudo"
        )
    if shutil.which("ip") is None:
        raise HostUnfit("the lab needs the ip command", "install it: apt-get install iproute2")


class Lab:
    """A lab of the given name; ``with Lab(...) as lab`` builds it and takes it down again."""

    def __init__(
        self,
        name: str = DEFAULT_NAME,
        *,
        extra: Sequence[str] = (),
        mtu: int = 1500,
        offloads: bool = True,
        forward: bool = False,
    ) -> None:
        """``forward`` is ip_forward on the assistant; ``extra`` adds roles of EXTRA_ROLES."""
        self.name = name
        self.roles = (*ROLES, *extra)
        self.mtu = mtu
        self.state_dir = _STATE_DIR / name
        self._offloads = offloads
        self._forward = forward
        self._children: list[subprocess.Popen[bytes]] = []

    # -- names and addresses -----------------------------------------------------------

    def namespace(self, role: str) -> str:
        return f"{self.name}-{role}"

    def prefix(self, role: str, family: int) -> str:
        number = _NUMBERS[role]
        return f"10.91.{number}.0/24" if family == 4 else f"fd00:91:{number}::/64"

    def address(self, role: str, family: int, index: int = 0) -> str:
        """The ``index``-th address of ``role``; only the client has more than one."""
        return str(ipaddress.ip_network(self.prefix(role, family))[_FIRST_HOST + index])

    def addresses(self, role: str, family: int) -> list[str]:
        count = CLIENT_ADDRESSES if role == "client" else 1
        return [self.address(role, family, index) for index in range(count)]

    def exists(self) -> bool:
        """True where anything at all of this name stands, whoever made it."""
        return self.state_dir.exists() or any(self._namespaces_found())

    # -- building and removing -----------------------------------------------------------

    def __enter__(self) -> Self:
        owner = self.state_dir / "owner"
        if owner.exists() and not _runs(owner.read_text(encoding="ascii")):
            self.down()  # its builder was killed before it could do that
        self.up()
        owner.write_text(_identity(os.getpid()), encoding="ascii")
        return self

    def __exit__(self, *_exc: object) -> None:
        self.down()

    def up(self) -> None:
        """Build it; whatever fails, nothing is left behind."""
        require_root()
        if self.exists():
            raise PycopyError(
                f"a lab named {self.name} exists already", "remove it: pycopy lab down"
            )
        try:
            self._build()
        except BaseException:
            self.down()
            raise

    def down(self) -> list[str]:
        """Remove everything of this name, most recent first; returns what was removed."""
        from pyroute2 import netns

        removed = [f"process {pid}" for pid in self._end_recorded_processes()]
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
        self._children.clear()
        for role in self._namespaces_found():
            netns.remove(self.namespace(role))
            removed.append(f"namespace {self.namespace(role)}")
        shutil.rmtree(self.state_dir, ignore_errors=True)
        with contextlib.suppress(OSError):
            _STATE_DIR.rmdir()  # only when this was the last lab
        return removed

    def _namespaces_found(self) -> Iterator[str]:
        for role in (*reversed(EXTRA_ROLES), *reversed(ROLES), SWITCH):
            if (_NETNS_DIR / self.namespace(role)).exists():
                yield role

    def _build(self) -> None:
        from pyroute2 import NetNS, netns

        self.state_dir.mkdir(parents=True, mode=0o700)
        for role in (SWITCH, *self.roles):
            netns.create(self.namespace(role))
            with self.inside(role):
                _write_sysctls(_SYSCTLS)
        if self._forward:
            self.set_forwarding(True)

        with NetNS(self.namespace(SWITCH)) as switch:
            # Forwarding at once, and no snooping: nothing may depend on when a host spoke first.
            switch.link("add", ifname="br0", kind="bridge", br_forward_delay=0, br_mcast_snooping=0)
            bridge = switch.link_lookup(ifname="br0")[0]
            switch.link("set", index=bridge, state="up", mtu=self.mtu)
            for role in self.roles:
                switch.link(
                    "add",
                    ifname=role,
                    kind="veth",
                    mtu=self.mtu,
                    peer={
                        "ifname": DEVICE,
                        "mtu": self.mtu,
                        "net_ns_fd": self.namespace(role),
                    },
                )
                port = switch.link_lookup(ifname=role)[0]
                switch.link("set", index=port, master=bridge, state="up")
        for role in self.roles:
            self._configure_host(role)
        if not self._offloads:
            self.set_offloads(False)

    def _configure_host(self, role: str) -> None:
        from pyroute2 import NetNS

        with NetNS(self.namespace(role)) as host:
            host.link("set", index=host.link_lookup(ifname="lo")[0], state="up")
            index = host.link_lookup(ifname=DEVICE)[0]
            host.link("set", index=index, state="up")
            for family, bits in ((4, 24), (6, 64)):
                for address in self.addresses(role, family):
                    host.addr("add", index=index, address=address, prefixlen=bits)
                # Link scope, or IPv4 would not accept the assistant as a gateway.
                scope = {"scope": _SCOPE_LINK} if family == 4 else {}
                for other in self.roles:
                    if other != role:
                        host.route("add", dst=self.prefix(other, family), oif=index, **scope)

    # -- changing ------------------------------------------------------------------------

    @contextlib.contextmanager
    def inside(self, role: str) -> Iterator[None]:
        """The calling thread's sockets and /proc/sys are ``role``'s within this block."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(_NETNS_DIR / self.namespace(role), os.O_RDONLY)
            try:
                _setns(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(home)

    def set_forwarding(self, on: bool) -> None:
        """ip_forward of the assistant; an attached intercept must not care."""
        with self.inside("assistant"):
            _write_sysctls(
                {
                    "net/ipv4/ip_forward": str(int(on)),
                    "net/ipv6/conf/all/forwarding": str(int(on)),
                }
            )

    def set_offloads(self, on: bool) -> None:
        """Checksum and segmentation offloads of every host's interface, both directions."""
        for role in self.roles:
            with self.inside(role):
                _offloads.set_all(DEVICE, on)
        with self.inside(SWITCH):
            for role in self.roles:
                _offloads.set_all(role, on)

    def route_through_assistant(self, network: str, on: bool = True) -> None:
        """The seeds' rule on the target: responses to ``network`` go to the assistant."""
        family = ipaddress.ip_network(network).version
        gateway = self.address("assistant", family)
        via = ["via", gateway]
        if network not in {self.prefix(role, family) for role in self.roles}:
            verb = "replace" if on else "delete"
        elif on:
            verb = "replace"
        else:
            verb, via = "replace", ["dev", DEVICE]
        self.run("target", ["ip", f"-{family}", "route", verb, network, *via])

    # -- processes -------------------------------------------------------------------------

    def popen(self, role: str, argv: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start ``argv`` on ``role`` in a process group of its own, recorded for ``down``.

        ``ip netns exec`` becomes the command without a fork, so that the pid is the
        command's, and gives it a /sys that shows the namespace's own devices. It is told
        to end when its starter dies, whatever killed that. Call this from the main thread.
        """
        command = ["ip", "netns", "exec", self.namespace(role), *argv]
        child: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            env=environment(),
            start_new_session=True,
            preexec_fn=_end_with_parent,
            **options,  # type: ignore[call-overload]
        )
        self._children.append(child)
        with (self.state_dir / "processes").open("a", encoding="ascii") as record:
            record.write(_identity(child.pid) + "\n")
        return child

    def run(
        self, role: str, argv: Sequence[str], timeout_s: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` on ``role`` to its end; a failure raises with what it printed."""
        result = subprocess.run(
            ["ip", "netns", "exec", self.namespace(role), *argv],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if result.returncode != 0:
            said = result.stderr.strip() or result.stdout.strip()
            raise PycopyError(f"{role}: {' '.join(argv)}: status {result.returncode}: {said}")
        return result

    def replace_self(self, role: str, argv: Sequence[str]) -> NoReturn:
        """Become ``argv`` on ``role``, for an interactive shell."""
        os.execvpe("ip", ["ip", "netns", "exec", self.namespace(role), *argv], environment())

    def _end_recorded_processes(self) -> list[int]:
        record = self.state_dir / "processes"
        if not record.exists():
            return []
        ended = []
        for line in reversed(record.read_text(encoding="ascii").splitlines()):
            if _runs(line):
                ended.append(int(line.split()[0]))
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(ended[-1], signal.SIGKILL)
        deadline = time.monotonic() + 5
        while any(_alive(pid) for pid in ended) and time.monotonic() < deadline:
            time.sleep(0.01)
        return ended


def environment() -> dict[str, str]:
    """The environment of lab processes: this very pycopy, from a checkout or installed."""
    env = dict(os.environ)
    package_parent = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(
        part for part in (package_parent, env.get("PYTHONPATH", "")) if part
    )
    return env


def _write_sysctls(values: dict[str, str]) -> None:
    for key, value in values.items():
        path = Path("/proc/sys", key)
        # Kernels differ in which of these are per namespace; a missing one is not fatal.
        if path.exists():
            path.write_text(value, encoding="ascii")


def _stat_fields(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _identity(pid: int) -> str:
    """Number and start time: a later process may get the same number, not both."""
    fields = _stat_fields(pid)
    return f"{pid} {fields[19] if fields else 0}"


def _runs(identity: str) -> bool:
    return bool(identity.strip()) and _identity(int(identity.split()[0])) == identity.strip()


def _alive(pid: int) -> bool:
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] != "Z"
