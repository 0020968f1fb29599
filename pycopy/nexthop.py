"""Where frames to a target go: egress interface, link header, MTU; and keeping that true.

The kernel decides (rtnetlink); this module asks, listens and never changes a route. A Hop is
updated in place, so a session that keeps a reference follows every change for nothing. The
kernel resolves neighbours too, but only for its own traffic, which pycopy's frames are not:
so it is asked to, and asked again before an entry ages out. Must not know sessions or frames.
"""

import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from pycopy import rtnetlink as rt
from pycopy.errors import PycopyError
from pycopy.loop import NEVER_NS

_UNSPECIFIED = bytes(16)

# Shorter than the time after which the kernel distrusts a neighbour (base_reachable_time,
# 15 to 45 s) or may drop it (gc_stale_time, 60 s); much longer than an answer takes.
_REFRESH_NS = 5_000_000_000
_RETRY_NS = 500_000_000
# Routes may flap by the thousand (a BGP router); one look per interval at our few targets.
_SETTLE_NS = 50_000_000
_EVENTS_PER_CALL = 64

# linux/neighbour.h, if.h, if_arp.h, rtnetlink.h
_NTF_USE, _NTF_EXT_LEARNED = 0x01, 0x10
_NUD_NOARP, _NUD_PERMANENT = 0x40, 0x80
_NDA_FLAGS_EXT = 15
_NUD_VALID = 0xDE  # all but NONE, INCOMPLETE and FAILED
_IFF_UP, _IFF_LOOPBACK, _IFF_NOARP, _IFF_LOWER_UP = 0x1, 0x8, 0x80, 0x10000
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
# PPP, raw IP, ipip, ip6tnl, sit, GRE, GRE over IPv6, none (tun, wireguard): no link header.
_ARPHRD_L3 = frozenset((512, 519, 768, 769, 776, 778, 823, 65534))
_RTN_UNICAST, _RTN_LOCAL = 1, 2
_ETHERTYPE: dict[int, bytes] = {socket.AF_INET: b"\x08\x00", socket.AF_INET6: b"\x86\xdd"}
_ADDRESS_BYTES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}

_NO_ROUTE = "no route"
_UNANSWERED = "the neighbour does not answer"
# What the kernel says of a destination, as an errno (most) or as a route type (the rest).
_ROUTE_ERRORS = {
    errno.EINVAL: "its route is a blackhole",
    errno.EHOSTUNREACH: "its route says unreachable",
    errno.EACCES: "its route says prohibit",
}
_ROUTE_TYPES = {
    3: "it is a broadcast address",
    5: "it is a multicast address",
    6: "its route is a blackhole",
    7: "its route says unreachable",
    8: "its route says prohibit",
}

# struct ndmsg after the 16 bytes of struct nlmsghdr: the interface index.
_NDMSG_IFINDEX = struct.Struct("=i").unpack_from


class _Unusable(Exception):
    """Why a hop cannot be used now; internal."""


class _Neighbour(NamedTuple):
    """Who must answer ARP or ND: the destination itself or its gateway."""

    ifindex: int
    family: int
    address: bytes


def _is_pinned(entry: Any) -> bool:
    """Whether somebody else keeps this entry: an administrator, a routing daemon, the kernel.

    NTF_USE must leave it alone then, for it would take exactly that property away: any
    RTM_NEWNEIGH sets or clears permanent, extern_learn and managed (Linux __neigh_update).
    """
    if entry["state"] & (_NUD_NOARP | _NUD_PERMANENT) or entry["flags"] & _NTF_EXT_LEARNED:
        return True
    # The kernel sends NDA_FLAGS_EXT only for managed entries; pyroute2 0.7 has no name for it.
    return any(
        name == "NDA_FLAGS_EXT" or (name == "UNKNOWN" and value["header"]["type"] == _NDA_FLAGS_EXT)
        for name, value in entry["attrs"]
    )


class Hop:
    """The way to one destination. Updated in place; ``trouble`` says why it is not usable."""

    __slots__ = ("destination", "ifindex", "ifname", "l2", "mtu", "source", "trouble", "usable")

    def __init__(self, destination: bytes) -> None:
        self.destination = destination
        self.ifindex = 0
        self.ifname = ""
        #: Destination MAC, source MAC, ethertype; empty on devices without a link header.
        self.l2 = b""
        self.mtu = 0
        #: The address this host would use itself, 16 bytes; all zero if it has none.
        self.source = _UNSPECIFIED
        #: Nothing must be sent otherwise: what is in the other fields may be old or empty.
        self.usable = False
        self.trouble = "not resolved yet"

    def _all(self) -> tuple[object, ...]:
        return (
            self.ifindex,
            self.ifname,
            self.l2,
            self.mtu,
            self.source,
            self.usable,
            self.trouble,
        )


class NextHops:
    """Next hops by destination; watch ``fileno()``, call ``tick`` when ``deadline_ns`` is due.

    ``on_change(hop)`` is called after a Hop changed, from resolve(), on_readable(), tick()
    and wait_usable().
    """

    def __init__(self, on_change: Callable[[Hop], None] | None = None) -> None:
        self._on_change = on_change
        self._codecs = rt.codecs()
        self._requests = rt.Requests()
        self._events = rt.open_events()
        self._hops: dict[bytes, Hop] = {}
        self._neighbours: dict[bytes, _Neighbour] = {}
        self._looked_ns = 0
        #: How often anything but a neighbour has changed: devices, addresses, routes.
        self.changes = 0
        self.deadline_ns = NEVER_NS

    def fileno(self) -> int:
        return self._events.fileno()

    def close(self) -> None:
        self._events.close()
        self._requests.close()

    def resolve(self, destination: bytes) -> Hop:
        """The Hop to ``destination`` (16 bytes, IPv4-mapped): always the same object.

        Never raises for a destination that cannot be reached: see ``usable``, ``trouble``.
        """
        hop = self._hops.get(destination)
        if hop is None:
            hop = self._hops[destination] = Hop(destination)
            self._look(hop)
            self._schedule(time.monotonic_ns())
        return hop

    def on_readable(self, _events: int = 0) -> None:
        """Something changed in the kernel's tables. Signature of a Loop callback."""
        changed = False
        try:
            for _ in range(_EVENTS_PER_CALL):
                data = self._events.recv(1 << 16)
                for kind, offset, length in rt.messages(data):
                    changed |= self._concerns(kind, data[offset : offset + length])
        except BlockingIOError:
            pass
        except OSError:  # ENOBUFS: events were lost, so anything may have changed
            self.changes += 1
            changed = True
        if changed:
            now_ns = time.monotonic_ns()
            if now_ns - self._looked_ns >= _SETTLE_NS:
                self.tick(now_ns)
            else:
                self.deadline_ns = min(self.deadline_ns, self._looked_ns + _SETTLE_NS)

    def tick(self, now_ns: int) -> None:
        """Look at every next hop again and keep its neighbour entry alive."""
        for hop in list(self._hops.values()):  # on_change may resolve another destination
            self._look(hop)
        self._schedule(now_ns)

    def wait_usable(self, timeout_s: float) -> None:
        """For start-up: until every Hop resolved so far is usable; PycopyError if one is not."""
        end_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        while waiting := [hop for hop in self._hops.values() if not hop.usable]:
            now_ns = time.monotonic_ns()
            if now_ns >= end_ns:
                raise self._failure(waiting[0])
            next_ns = min(end_ns, max(self.deadline_ns, now_ns))
            if poll.poll((next_ns - now_ns) / 1e6 + 1):
                self.on_readable()
            now_ns = time.monotonic_ns()
            if now_ns >= self.deadline_ns:
                self.tick(now_ns)

    def _schedule(self, now_ns: int) -> None:
        self._looked_ns = now_ns
        if self._hops:
            usable = all(hop.usable for hop in self._hops.values())
            self.deadline_ns = now_ns + (_REFRESH_NS if usable else _RETRY_NS)

    def _concerns(self, kind: int, message: bytes) -> bool:
        # Links, addresses, routes and rules change seldom: look. Neighbours change all the
        # time, so theirs must name one of ours; a chance match costs one look.
        if kind not in (rt.RTM_NEWNEIGH, rt.RTM_DELNEIGH):
            self.changes += 1
            return True
        ifindex = _NDMSG_IFINDEX(message, 20)[0]
        return any(
            neighbour.ifindex == ifindex
            and neighbour.address[-_ADDRESS_BYTES[neighbour.family] :] in message
            for neighbour in self._neighbours.values()
        )

    def _look(self, hop: Hop) -> None:
        before = hop._all()
        try:
            self._follow(hop)
        except _Unusable as reason:
            hop.usable = False
            hop.trouble = str(reason)
        else:
            hop.usable = True
            hop.trouble = ""
        if self._on_change is not None and hop._all() != before:
            self._on_change(hop)

    def _follow(self, hop: Hop) -> None:
        """Bring ``hop`` up to date; what is not known any more keeps its last value."""
        route = self._route(hop)
        ifindex = route.get_attr("RTA_OIF") or 0
        link = self._link(ifindex)
        hop.ifindex = ifindex
        hop.ifname = link.get_attr("IFLA_IFNAME")
        metrics = route.get_attr("RTA_METRICS")
        route_mtu = (metrics.get_attr("RTAX_MTU") if metrics else None) or 0
        device_mtu = link.get_attr("IFLA_MTU")
        hop.mtu = min(route_mtu, device_mtu) if route_mtu else device_mtu
        source = route.get_attr("RTA_PREFSRC")
        hop.source = rt.from_text(source) if source else _UNSPECIFIED
        flags, arphrd_type = link["flags"], link["ifi_type"]
        if not flags & _IFF_UP:
            raise _Unusable(f"{hop.ifname} is down")
        if not flags & _IFF_LOWER_UP:
            raise _Unusable(f"{hop.ifname} has no carrier")
        if arphrd_type in _ARPHRD_L3:
            hop.l2 = b""
            return
        if arphrd_type not in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK):
            raise _Unusable(f"{hop.ifname} is neither Ethernet nor a plain IP device")
        own_mac = rt.mac_bytes(link.get_attr("IFLA_ADDRESS"))
        if flags & (_IFF_NOARP | _IFF_LOOPBACK):
            mac = own_mac  # what the kernel itself writes then (arp_constructor)
        else:
            mac = self._neighbour_mac(self._neighbours[hop.destination])
        l2 = mac + own_mac + _ETHERTYPE[rt.family_of(hop.destination)]
        # wire.py knows a next hop by the identity of this object.
        if l2 != hop.l2:
            hop.l2 = l2

    def _route(self, hop: Hop) -> Any:
        """The kernel's choice for ``hop`` (of several next hops, one); notes its neighbour."""
        self._neighbours.pop(hop.destination, None)
        family = rt.family_of(hop.destination)
        message = self._codecs.rtmsg()
        message["family"] = family
        message["dst_len"] = 8 * _ADDRESS_BYTES[family]
        message["attrs"] = [("RTA_DST", rt.to_text(hop.destination))]
        try:
            route = self._requests.ask(rt.RTM_GETROUTE, 0, message)[0]
        except OSError as problem:
            raise _Unusable(_ROUTE_ERRORS.get(problem.errno or 0, _NO_ROUTE)) from None
        if route["type"] not in (_RTN_UNICAST, _RTN_LOCAL):
            raise _Unusable(_ROUTE_TYPES.get(route["type"], _NO_ROUTE))
        address = hop.destination
        gateway = route.get_attr("RTA_GATEWAY")
        via = route.get_attr("RTA_VIA")  # an IPv6 gateway for IPv4 (RFC 5549)
        if gateway:
            address = rt.from_text(gateway)
        elif via:
            address = rt.from_text(via["addr"])
        self._neighbours[hop.destination] = _Neighbour(
            route.get_attr("RTA_OIF") or 0, rt.family_of(address), address
        )
        return route

    def _link(self, ifindex: int) -> Any:
        message = self._codecs.ifinfmsg()
        message["index"] = ifindex
        try:
            return self._requests.ask(rt.RTM_GETLINK, 0, message)[0]
        except OSError:
            raise _Unusable("its interface is gone") from None

    def _neighbour_mac(self, neighbour: _Neighbour) -> bytes:
        entry = None
        with contextlib.suppress(OSError):  # ENOENT: not known yet
            entry = self._requests.ask(rt.RTM_GETNEIGH, 0, self._neighbour_message(neighbour))[0]
        if entry is None or not _is_pinned(entry):
            # NTF_USE is what `ip neigh add ... use` sends: as if a packet wanted to go there.
            # The kernel starts resolving, or re-checks an entry that has become stale; what
            # comes of it is an event.
            message = self._neighbour_message(neighbour)
            message["flags"] = _NTF_USE
            with contextlib.suppress(OSError):
                self._requests.ask(rt.RTM_NEWNEIGH, rt.NLM_F_ACK | rt.NLM_F_CREATE, message)
        if entry is None or not entry["state"] & _NUD_VALID:
            raise _Unusable(_UNANSWERED)
        mac = rt.mac_bytes(entry.get_attr("NDA_LLADDR"))
        if len(mac) != 6:
            raise _Unusable(_UNANSWERED)
        return mac

    def _neighbour_message(self, neighbour: _Neighbour) -> Any:
        message = self._codecs.ndmsg()
        message["family"] = neighbour.family
        message["ifindex"] = neighbour.ifindex
        message["attrs"] = [("NDA_DST", rt.to_text(neighbour.address))]
        return message

    def _failure(self, hop: Hop) -> PycopyError:
        name = rt.to_text(hop.destination)
        neighbour = self._neighbours.get(hop.destination)
        if neighbour is None:
            reason = "" if hop.trouble == _NO_ROUTE else f": {hop.trouble}"
            return PycopyError(
                f"no route to {name}{reason}",
                f"see `ip route get {name}`; add a route, or correct the target",
            )
        who = f"target {name}"
        if neighbour.address != hop.destination:
            who = f"gateway {rt.to_text(neighbour.address)} of target {name}"
        arp = "ARP" if neighbour.family == socket.AF_INET else "neighbour discovery"
        if hop.trouble != _UNANSWERED:
            return PycopyError(f"{who}: {hop.trouble}", f"see `ip link show {hop.ifname}`")
        return PycopyError(
            f"{who} does not answer {arp} on {hop.ifname}",
            f"is it up, and on this network? see `ip neigh show dev {hop.ifname}`",
        )
