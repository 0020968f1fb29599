"""Put a loaded program on an interface so that it cannot outlive us, and take it off again.

A bpf_link is held by its descriptor alone: whichever way the process dies, the kernel
detaches. TC has links from 6.6 on (TCX); below that a clsact filter does the work, which
does outlive its process, so it is marked as ours and detach_leftovers() can clear it.
The netlink way to attach XDP is never taken: it replaces what others have attached.
Nothing here knows what a program does.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Protocol

from pycopy.errors import HostUnfit, PycopyError, UsageError
from pycopy.host import netlink
from pycopy.kernel import clsact, syscall

# linux/rtnetlink.h, linux/if_link.h: native, generic, offloaded
_GET_LINK = 18
_IFINFOMSG = struct.Struct("=BxHiII")
_IFLA_XDP = 43
_XDP_MODE_IDS = (5, 6, 7)

_SIOCGIFMTU = 0x8921
_IFREQ = struct.Struct("=16si20x")


class Hook(Enum):
    """Where a program sees packets."""

    TC_INGRESS = "tc ingress"
    TC_EGRESS = "tc egress"
    XDP = "xdp"


_TCX = {Hook.TC_INGRESS: syscall.TCX_INGRESS, Hook.TC_EGRESS: syscall.TCX_EGRESS}
_CLSACT = {Hook.TC_INGRESS: clsact.INGRESS, Hook.TC_EGRESS: clsact.EGRESS}


class Program(Protocol):
    """What attaching needs of a pycopy.loader.Module."""

    program_name: str
    program_fd: int
    hook_xdp: bool


class HookTaken(HostUnfit):
    """Somebody else's XDP program is on the interface; TC would still be possible."""


class Attachment:
    """A program on an interface. ``how`` says in which way, ``reason`` why not in a better one."""

    def __init__(
        self, ifname: str, ifindex: int, hook: Hook, fd: int, how: str, reason: str
    ) -> None:
        self.ifname = ifname
        self.ifindex = ifindex
        self.hook = hook
        self.how = how
        self.reason = reason
        self._fd = fd

    def alive(self) -> bool:
        """False once the interface is gone or somebody has detached the program."""
        return self._fd >= 0 and syscall.link_info(self._fd).ifindex == self.ifindex

    def close(self) -> None:
        """Detach. Closing twice does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _FilterAttachment(Attachment):
    """A clsact filter; ``_fd`` is the program's, which tells detach_leftovers() we live."""

    def __init__(
        self, ifname: str, ifindex: int, hook: Hook, fd: int, reason: str, ours: clsact.Filter
    ) -> None:
        super().__init__(ifname, ifindex, hook, fd, "clsact filter", reason)
        self._filter = ours

    def alive(self) -> bool:
        return self._fd >= 0 and self._filter in clsact.ours(self.ifindex)

    def close(self) -> None:
        if self._fd >= 0:
            clsact.remove(self._filter)
        super().close()


def attach(module: Program, ifname: str, hook: Hook, *, prefer_link: bool = True) -> Attachment:
    """Attach; ``prefer_link=False`` takes the way of kernels below 6.6 for a TC hook.

    Raises PycopyError, with nothing attached; ValueError if the program is not for this hook.
    """
    if module.hook_xdp != (hook is Hook.XDP):
        raise ValueError(f"{module.program_name} was not compiled for {hook.value}")
    ifindex = _ifindex(ifname)
    if hook is Hook.XDP:
        return _attach_xdp(module, ifname, ifindex)
    reason = "not wanted"
    if prefer_link:
        try:
            fd = syscall.link_create(module.program_fd, ifindex, _TCX[hook], syscall.BEFORE)
            return Attachment(ifname, ifindex, hook, fd, "tcx link", "")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _failed(ifname, hook, error) from error
            reason = "this kernel has no TCX links (they came with 6.6)"
    try:
        ours = clsact.install(module.program_fd, module.program_name, ifindex, _CLSACT[hook])
    except OSError as error:
        raise _failed(ifname, hook, error) from error
    return _FilterAttachment(ifname, ifindex, hook, os.dup(module.program_fd), reason, ours)


def _ifindex(ifname: str) -> int:
    try:
        return socket.if_nametoindex(ifname)
    except OSError as error:
        names = ", ".join(name for _, name in socket.if_nameindex())
        raise UsageError(f"there is no interface {ifname}", f"interfaces here: {names}") from error


def _failed(ifname: str, hook: Hook, error: OSError) -> PycopyError:
    text = os.strerror(error.errno or 0)
    if error.errno == errno.EPERM:
        return HostUnfit(
            f"the kernel does not let us attach to {ifname} ({hook.value}): {text}",
            "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW",
        )
    return PycopyError(f"cannot attach to {ifname} ({hook.value}): {text}")


# --- XDP ---------------------------------------------------------------------------------


def _attach_xdp(module: Program, ifname: str, ifindex: int) -> Attachment:
    reason = ""
    for flags, how in (
        (syscall.XDP_FLAGS_DRV, "native xdp link"),
        (syscall.XDP_FLAGS_SKB, "generic xdp link"),
    ):
        try:
            fd = syscall.link_create(module.program_fd, ifindex, syscall.XDP, flags)
            return Attachment(ifname, ifindex, Hook.XDP, fd, how, reason)
        except OSError as error:
            # EEXIST: somebody is there in the other mode, native or generic.
            if error.errno in (errno.EBUSY, errno.EEXIST):
                raise _taken(ifname, ifindex) from error
            if error.errno in (errno.EPERM, errno.ENODEV) or flags == syscall.XDP_FLAGS_SKB:
                raise _failed(ifname, Hook.XDP, error) from error
            reason = f"native: {_refusal(ifname, error)}"
    raise AssertionError("unreachable")


def _refusal(ifname: str, error: OSError) -> str:
    """Why a driver refused native XDP; the kernel says it only by errno."""
    number = error.errno or 0
    if number == errno.EOPNOTSUPP:
        return f"the driver of {ifname} has no XDP"
    text = os.strerror(number)
    if number in (errno.ERANGE, errno.EINVAL):
        return f"the driver of {ifname} refuses, MTU {_mtu(ifname)} may be too large ({text})"
    return f"the driver of {ifname} refuses ({text})"


def _mtu(ifname: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = _IFREQ.pack(ifname.encode(), 0)
        mtu: int = _IFREQ.unpack(fcntl.ioctl(any_socket, _SIOCGIFMTU, request))[1]
        return mtu


def _taken(ifname: str, ifindex: int) -> HookTaken:
    ids = xdp_program_ids(ifindex)
    who = " and ".join(_describe_program(ident) for ident in ids) or "another program"
    return HookTaken(
        f"XDP on {ifname} is taken by {who}",
        f"use the TC hook, or stop what attached it (bpftool net show dev {ifname})",
    )


def xdp_program_ids(ifindex: int) -> list[int]:
    """Programs at the XDP hook, whoever attached them and however."""
    (answer,) = netlink.request(_GET_LINK, 0, _IFINFOMSG.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0))
    xdp = netlink.attributes(netlink.attributes(answer[_IFINFOMSG.size :]).get(_IFLA_XDP, b""))
    return [int.from_bytes(xdp[mode], sys.byteorder) for mode in _XDP_MODE_IDS if mode in xdp]


def _describe_program(ident: int) -> str:
    try:
        fd = syscall.program_fd_by_id(ident)
    except OSError:
        return f"program {ident}"
    try:
        return f"program {ident} ({syscall.program_info(fd).name or 'no name'})"
    finally:
        os.close(fd)


# --- leftovers, and what there is at all -------------------------------------------------


def detach_leftovers(ifnames: Iterable[str] | None = None) -> list[str]:
    """Remove the clsact filters of pycopy processes that died; say what was removed.

    Filters whose program a running process still holds are left alone: they are in use.
    """
    wanted = set(ifnames) if ifnames is not None else None
    for ifname in wanted or ():
        _ifindex(ifname)
    found = [
        (ifname, ours)
        for ifindex, ifname in socket.if_nameindex()
        if wanted is None or ifname in wanted
        for ours in clsact.ours(ifindex)
    ]
    held = _held_program_ids() if found else set()
    removed = []
    for ifname, ours in found:
        if ours.program_id not in held:
            clsact.remove(ours)
            removed.append(f"{ifname}: clsact filter {ours.name}, priority {ours.priority}")
    return removed


def attachments() -> list[str]:
    """Every pycopy program attached in this network namespace, one line each."""
    lines = []
    for ifindex, ifname in socket.if_nameindex():
        programs = [("xdp", ident) for ident in xdp_program_ids(ifindex)]
        for hook, attach_type in _TCX.items():
            # Below 6.6 there is nothing to ask.
            with contextlib.suppress(OSError):
                programs += [
                    (hook.value, ident) for ident, _ in syscall.attached(ifindex, attach_type)
                ]
        lines += [f"{ifname}: {where}, {_describe_program(ident)}" for where, ident in programs]
        lines += [f"{ifname}: clsact filter {ours.name}" for ours in clsact.ours(ifindex)]
    return [line for line in lines if clsact.NAME_PREFIX in line]


def _held_program_ids() -> set[int]:
    """Ids of the programs that running processes hold descriptors of."""
    ids: set[int] = set()
    for process in Path("/proc").iterdir():
        # Processes and descriptors come and go while we look; one that has gone holds nothing.
        with contextlib.suppress(OSError):
            if process.name.isdigit():
                fds = os.listdir(process / "fd")
                ids.update(ident for fd in fds if (ident := _program_id(process, fd)) is not None)
    return ids


def _program_id(process: Path, fd: str) -> int | None:
    """The id of the program that this descriptor refers to; None: no program, or it is closed."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        if os.readlink(process / "fd" / fd) == "anon_inode:bpf-prog":
            info = (process / "fdinfo" / fd).read_text("ascii")
            line = next(line for line in info.splitlines() if line.startswith("prog_id:"))
            return int(line.split()[1])
    return None
