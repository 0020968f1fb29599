"""The lab: five or more network namespaces on one bridge, for tests and for trying pycopy out.

Every role has an interface ``eth0`` and address prefixes of its own, and reaches all other
prefixes on-link. So the target can be told to route the clients' prefix through the
assistant, as on real sites, while nothing else changes. All devices live inside the
namespaces: the host's own network is not touched, and two labs of different names never
meet. Knows nothing of what runs inside, except the processes started through it, which it
ends before the namespaces go.

Tests: tests/lab/test_lab.py
"""

import contextlib
import fcntl
import ipaddress
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

from pycopy.command.config import LAB_NAME
from pycopy.errors import HostUnfit, PycopyError, UsageError
from pycopy.host import privileges

from . import offloads as _offloads
from . import processes, sysctls

ROLES = ("client", "online", "target", "assistant")
EXTRA_ROLES = ("online2",)
SWITCH = "switch"
DEVICE = "eth0"

#: Third group of a role's prefixes: 10.91.N.0/24 and fd00:91:N::/64.
_NUMBERS = {"client": 1, "online": 2, "target": 3, "assistant": 4, "online2": 5}
_FIRST_HOST = 10
CLIENT_ADDRESSES = 64

#: It names a directory and namespaces, which are removed by that name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

_STATE_DIR = Path("/run/pycopy-lab")
_NETNS_DIR = Path("/run/netns")
_SCOPE_LINK = 253
_CAP_SYS_ADMIN = 1 << 21


def require_root() -> None:
    """Namespaces need CAP_SYS_ADMIN: HostUnfit says so before half a lab stands."""
    if os.geteuid() != 0 or not privileges.effective_capabilities() & _CAP_SYS_ADMIN:
        container = "" if os.geteuid() else "; a container must be privileged"
        raise HostUnfit(
            "the lab makes network namespaces, which needs root", f"run it with sudo{container}"
        )
    if shutil.which("ip") is None:
        raise HostUnfit("the lab needs the ip command", "install it: apt-get install iproute2")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other process is in here meanwhile."""
    while True:
        _STATE_DIR.mkdir(mode=0o755, exist_ok=True)
        try:
            fd = os.open(_STATE_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # the last lab went away in between
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not _STATE_DIR.exists() or not os.path.samestat(os.fstat(fd), _STATE_DIR.stat()):
                continue
            yield
            return
        finally:
            os.close(fd)


def names() -> list[str]:
    """The labs of this machine."""
    return sorted(path.name for path in _STATE_DIR.iterdir()) if _STATE_DIR.is_dir() else []


class Lab:
    """A lab of the given name; ``with Lab(...) as lab`` builds it and takes it down again."""

    def __init__(
        self,
        name: str = LAB_NAME,
        *,
        extra: Sequence[str] = (),
        mtu: int = 1500,
        offloads: bool = True,
        forward: bool = False,
        cpus: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        """``forward`` is ip_forward on the assistant; ``extra`` adds roles of EXTRA_ROLES.

        ``cpus``: where a role's processes run and where what reaches it is received; of roles
        that are not named, anywhere.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"--name {name!r} cannot be the name of a lab",
                "up to 64 letters, digits and _ . -, of which the first is a letter or digit",
            )
        self.name = name
        self.roles = (*ROLES, *extra)
        self.mtu = mtu
        self.state_dir = _STATE_DIR / name
        self._offloads = offloads
        self._forward = forward
        self.cpus = dict(cpus or {})
        self._children: list[subprocess.Popen[bytes]] = []
        #: Namespaces that this object made: all that a failed build may take down.
        self._made: list[str] = []

    # -- names and addresses -----------------------------------------------------------

    def namespace(self, role: str) -> str:
        """The name of a role's network namespace."""
        return f"{self.name}-{role}"

    def prefix(self, role: str, family: int) -> str:
        """The network of a role's addresses (``family`` 4 or 6), as text."""
        number = _NUMBERS[role]
        return f"10.91.{number}.0/24" if family == 4 else f"fd00:91:{number}::/64"

    def address(self, role: str, family: int, index: int = 0) -> str:
        """The ``index``-th address of ``role``; only the client has more than one."""
        return str(ipaddress.ip_network(self.prefix(role, family))[_FIRST_HOST + index])

    def addresses(self, role: str, family: int) -> list[str]:
        """All addresses of a role: CLIENT_ADDRESSES of the client, one of each other host."""
        count = CLIENT_ADDRESSES if role == "client" else 1
        return [self.address(role, family, index) for index in range(count)]

    def exists(self) -> bool:
        """True where anything at all of this name stands, whoever made it."""
        return self.is_built() or any(self._namespaces_found())

    def is_built(self) -> bool:
        """True where there is a lab of this name, be it in parts."""
        return self.state_dir.exists()

    def command(self, action: str) -> str:
        """What a user types to do ``action`` to this lab and no other."""
        name = "" if self.name == LAB_NAME else f" --name {self.name}"
        return f"pycopy lab{name} {action}"

    def is_here(self) -> bool:
        """True in a process that runs on one of this lab's hosts."""
        return processes.is_inside(self._namespace_files())

    # -- building and removing -----------------------------------------------------------

    def __enter__(self) -> Self:
        self._begin(for_this_process=True)
        self._build_or_undo()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._owner() == processes.identity(os.getpid()):  # else it is another one by now
            self.down()

    def up(self) -> None:
        """Build it, to stay when this process ends; whatever fails, nothing is left behind."""
        self._begin(for_this_process=False)
        self._build_or_undo()

    def _begin(self, for_this_process: bool) -> None:
        """Take the name, or say that somebody has it; of two at once only one gets it."""
        require_root()
        with _alone():
            owner = self._owner()
            if for_this_process and owner and not processes.runs(owner):
                self.down()  # its builder was killed before it could do that
            try:
                self.state_dir.mkdir(parents=True, mode=0o700)
            except FileExistsError:
                user = f", in use by process {owner.split()[0]}" if owner else ""
                wait = "wait for its end, or " if user else ""
                raise PycopyError(
                    f"a lab named {self.name} exists already{user}",
                    f"{wait}remove it: {self.command('down')}",
                ) from None
            if for_this_process:
                identity = processes.identity(os.getpid())
                (self.state_dir / "owner").write_text(identity, encoding="ascii")

    def _owner(self) -> str:
        """The identity of the process that the lab ends with; empty when it stays."""
        try:
            return (self.state_dir / "owner").read_text(encoding="ascii")
        except OSError:
            return ""

    def _build_or_undo(self) -> None:
        try:
            for role in self._namespaces_found():
                name = self.namespace(role)
                raise PycopyError(
                    f"there is a network namespace {name} already, of no lab",
                    f"give the lab another --name, or remove it: ip netns delete {name}",
                )
            self._build()
        except BaseException:
            self._remove(self._made)
            raise

    def down(self) -> list[str]:
        """Remove the lab of this name, processes first; returns what was removed."""
        if not self.is_built():
            return []
        return self._remove([self.namespace(role) for role in self._namespaces_found()])

    def _remove(self, namespaces: Sequence[str]) -> list[str]:
        from pyroute2 import netns

        record = self.state_dir / "processes"
        lines = record.read_text(encoding="ascii").splitlines() if record.exists() else []
        ended = processes.kill_groups(reversed(lines))
        ended += processes.end_inside([_NETNS_DIR / name for name in namespaces])
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
        self._children.clear()
        for name in namespaces:
            try:
                netns.remove(name)
            except OSError as error:
                if (_NETNS_DIR / name).exists():  # else somebody was faster
                    raise PycopyError(f"cannot remove the namespace {name}: {error}") from None
        self._made = []
        # The name was checked; this is for whoever changes that check.
        if self.state_dir.parent == _STATE_DIR and self.state_dir.name not in ("", ".", ".."):
            shutil.rmtree(self.state_dir, ignore_errors=True)
        with contextlib.suppress(OSError):
            _STATE_DIR.rmdir()  # only when this was the last lab
        return [f"process {pid}" for pid in ended] + [f"namespace {name}" for name in namespaces]

    def _namespaces_found(self) -> Iterator[str]:
        for role in (*reversed(EXTRA_ROLES), *reversed(ROLES), SWITCH):
            if (_NETNS_DIR / self.namespace(role)).exists():
                yield role

    def _namespace_files(self) -> list[Path]:
        return [_NETNS_DIR / self.namespace(role) for role in self._namespaces_found()]

    def _build(self) -> None:
        from pyroute2 import NetNS, netns

        for role in (SWITCH, *self.roles):
            netns.create(self.namespace(role))
            self._made.insert(0, self.namespace(role))
            with self.inside(role):
                sysctls.write(sysctls.HOST)
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
        if role in self.cpus:
            mask = sum(1 << cpu for cpu in self.cpus[role])
            # A veth's packets are received by whichever CPU sent them, unless they are steered.
            steer = f"echo {mask:x} > /sys/class/net/{DEVICE}/queues/rx-0/rps_cpus"
            self.run(role, ["sh", "-c", steer])

    # -- changing ------------------------------------------------------------------------

    @contextlib.contextmanager
    def inside(self, role: str) -> Iterator[None]:
        """The calling thread's sockets and /proc/sys are ``role``'s within this block."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(_NETNS_DIR / self.namespace(role), os.O_RDONLY)
            try:
                processes.set_network(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                processes.set_network(home)
        finally:
            os.close(home)

    def set_forwarding(self, on: bool) -> None:
        """ip_forward of the assistant; an attached intercept must not care."""
        with self.inside("assistant"):
            sysctls.write(
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

    def route_command(self, network: str, on: bool = True) -> list[str]:
        """What the target is told, so that responses to ``network`` go to the assistant."""
        family = ipaddress.ip_network(network).version
        via = ["via", self.address("assistant", family)]
        if network not in {self.prefix(role, family) for role in self.roles}:
            verb = "replace" if on else "delete"
        elif on:
            verb = "replace"
        else:
            verb, via = "replace", ["dev", DEVICE]
        return ["ip", f"-{family}", "route", verb, network, *via]

    def route_through_assistant(self, network: str, on: bool = True) -> None:
        """The seeds' rule on the target: responses to ``network`` go to the assistant."""
        self.run("target", self.route_command(network, on))

    # -- processes -------------------------------------------------------------------------

    def popen(self, role: str, argv: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start ``argv`` on ``role`` in a process group of its own, recorded for ``down``.

        ``ip netns exec`` becomes the command without a fork, so that the pid is the
        command's, and gives it a /sys that shows the namespace's own devices. It is told
        to end when its starter dies, whatever killed that. Call this from the main thread.
        """
        command = ["ip", "netns", "exec", self.namespace(role), *argv]
        cpus = self.cpus.get(role)

        def prepare() -> None:
            processes.end_with_parent()
            if cpus:
                os.sched_setaffinity(0, cpus)

        child: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            env=environment(),
            start_new_session=True,
            preexec_fn=prepare,
            **options,  # type: ignore[call-overload]
        )
        self._children.append(child)
        with (self.state_dir / "processes").open("a", encoding="ascii") as record:
            record.write(processes.identity(child.pid) + "\n")
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


def environment() -> dict[str, str]:
    """The environment of lab processes: this very pycopy, from a checkout or installed."""
    env = dict(os.environ)
    package_parent = str(Path(__file__).resolve().parents[2])
    # An empty part, as a relative one, is the current directory to Python: left out.
    others = env.get("PYTHONPATH", "").split(os.pathsep)
    env["PYTHONPATH"] = os.pathsep.join([package_parent, *filter(os.path.isabs, others)])
    return env


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours, in :func:`environment`: nothing is imported from
    the current directory, whatever lies there."""
    return [sys.executable, "-P", "-m", module, *arguments]
