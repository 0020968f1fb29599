"""Programs as filters of the clsact qdisc: the way onto a TC hook where TCX links are missing.

Such a filter outlives its process, so each of ours is marked: by its handle and by its
name, which also says whether the qdisc came with it. Whatever does not carry the mark is
somebody else's and is never touched. Failures are OSErrors with the kernel's errno.

Tests: tests/bpf/test_attach.py
"""

import contextlib
import errno
import os
import socket
import struct
from typing import NamedTuple

from pycopy.host.netlink import CREATE, DUMP, EXCL, attribute, attributes, request
from pycopy.kernel import syscall

INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3

#: Names of all our programs begin so, and so do the names of our filters.
NAME_PREFIX = "pycopy_"

#: A filter of ours has a handle in this range, one for each pycopy on the interface.
_HANDLES = range(0x70790001, 0x70790101)

#: First in the chain, because a filter before ours may end it; the next ones are for
#: interfaces where somebody's filter of another kind has the priority.
_PRIORITIES = range(1, 10)

#: End of a filter's name when the qdisc was not there before us.
_OWN_QDISC = "/clsact"

_PROTOCOL = socket.htons(3)  # ETH_P_ALL

# linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h
_NEW_QDISC, _DEL_QDISC = 36, 37
_NEW_FILTER, _DEL_FILTER, _GET_FILTER = 44, 45, 46
_TCMSG = struct.Struct("=BxxxiIII")
_TCA_KIND, _TCA_OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
_QDISC_HANDLE, _QDISC_PARENT = 0xFFFF0000, 0xFFFFFFF1


class Filter(NamedTuple):
    """One of our filters, as the kernel lists it."""

    ifindex: int
    parent: int
    priority: int
    handle: int
    name: str
    program_id: int

    @property
    def owns_qdisc(self) -> bool:
        """True if we made the qdisc together with this filter, so that both may go."""
        return self.name.endswith(_OWN_QDISC)


def install(program_fd: int, program_name: str, ifindex: int, parent: int) -> Filter:
    """Make a direct-action filter of a program, and the qdisc if there is none."""
    created = _add_qdisc(ifindex)
    name = program_name + _OWN_QDISC if created else program_name
    try:
        return _add_filter(program_fd, name, ifindex, parent)
    except BaseException:
        if created:
            _delete_qdisc(ifindex)
        raise


def _qdisc(ifindex: int) -> bytes:
    message = _TCMSG.pack(socket.AF_UNSPEC, ifindex, _QDISC_HANDLE, _QDISC_PARENT, 0)
    return message + attribute(_TCA_KIND, b"clsact\0")


def _add_qdisc(ifindex: int) -> bool:
    """Whether it was not there before."""
    try:
        request(_NEW_QDISC, CREATE | EXCL, _qdisc(ifindex))
    except FileExistsError:
        return False
    return True


def _delete_qdisc(ifindex: int) -> None:
    request(_DEL_QDISC, 0, _qdisc(ifindex))


def _filter(ifindex: int, parent: int, priority: int, handle: int) -> bytes:
    info = priority << 16 | _PROTOCOL
    message = _TCMSG.pack(socket.AF_UNSPEC, ifindex, handle, parent, info)
    return message + attribute(_TCA_KIND, b"bpf\0")


def _add_filter(program_fd: int, name: str, ifindex: int, parent: int) -> Filter:
    program_id = syscall.program_info(program_fd).id
    options = attribute(
        _TCA_OPTIONS,
        attribute(_BPF_FD, struct.pack("=I", program_fd))
        + attribute(_BPF_NAME, name.encode() + b"\0")
        + attribute(_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION)),
    )
    for priority in _PRIORITIES:
        for handle in _HANDLES:
            message = _filter(ifindex, parent, priority, handle) + options
            try:
                request(_NEW_FILTER, CREATE | EXCL, message)
                return Filter(ifindex, parent, priority, handle, name, program_id)
            except FileExistsError:  # another pycopy's
                continue
            except OSError as error:
                if error.errno == errno.EINVAL:  # the priority is another kind of filter's
                    break
                raise
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def ours(ifindex: int) -> list[Filter]:
    """Our filters on an interface, this process's or not."""
    found = []
    for parent in (INGRESS, EGRESS):
        for message in _listed(ifindex, parent):
            _, _, handle, _, info = _TCMSG.unpack_from(message)
            described = attributes(message[_TCMSG.size :])
            options = attributes(described.get(_TCA_OPTIONS, b""))
            name = options.get(_BPF_NAME, b"").rstrip(b"\0").decode("utf-8", "replace")
            if handle in _HANDLES and name.startswith(NAME_PREFIX):
                (program_id,) = struct.unpack("=I", options[_BPF_ID])
                found.append(Filter(ifindex, parent, info >> 16, handle, name, program_id))
    return found


def _listed(ifindex: int, parent: int) -> list[bytes]:
    """All filters at a parent, anybody's."""
    return request(_GET_FILTER, DUMP, _TCMSG.pack(socket.AF_UNSPEC, ifindex, 0, parent, 0))


def remove(each: Filter) -> None:
    """Remove one of ours, and the qdisc if it came with it and nobody uses it now."""
    # Gone already, or the interface is: all the same.
    with contextlib.suppress(OSError):
        request(_DEL_FILTER, 0, _filter(*each[:4]))
        used = _listed(each.ifindex, INGRESS) or _listed(each.ifindex, EGRESS)
        if each.owns_qdisc and not used:
            _delete_qdisc(each.ifindex)
