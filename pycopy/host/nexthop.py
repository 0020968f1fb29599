"""Where frames to a target go: egress interface, link header, MTU; and keeping that true.

The kernel decides (rtnetlink); this module asks, listens and never changes a route. A Hop is
updated in place, so a session that keeps a reference follows every change for nothing. The
kernel resolves neighbours too, but only for its own traffic, which pycopy's frames are not:
so it is asked to, and asked again before an entry ages out. There may be thousands of targets:
nothing here is done for all of them because of one, nor for so long that traffic has to wait.
Must not know sessions or frames.
"""

import errno
import select
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from pycopy.errors import PycopyError
from pycopy.host import rtnetlink as rt
from pycopy.process.loop import NEVER_NS
from pycopy.wire.address import unmap_address

_UNSPECIFIED = bytes(16)

# Shorter than the time after which the kernel distrusts a neighbour (base_reachable_time,
# 15 to 45 s) or may drop it (gc_stale_time, 60 s); much longer than an answer takes.
_REFRESH_NS = 5_000_000_000
_RETRY_NS = 500_000_000
# Routes may flap by the thousand (a BGP router); one look per interval at our targets.
_SETTLE_NS = 50_000_000
_EVENTS_PER_CALL = 64
# Many targets are looked at in slices, so that traffic gets its turn: after each it rests this
# many times as long, and takes a fifth of a CPU at most.
_SLICE_NS = 5_000_000
_REST = 4

# linux/neighbour.h, if.h, if_arp.h, rtnetlink.h
_NTF_EXT_LEARNED = 0x10
_NUD_NOARP, _NUD_PERMANENT = 0x40, 0x80
_NUD_VALID = 0xDE  # all but NONE, INCOMPLETE and FAILED
_IFF_UP, _IFF_LOOPBACK, _IFF_NOARP, _IFF_LOWER_UP = 0x1, 0x8, 0x80, 0x10000
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
# PPP, raw IP, ipip, ip6tnl, sit, GRE, GRE over IPv6, none (tun, wireguard): no link header.
_ARPHRD_L3 = frozenset((512, 519, 768, 769, 776, 778, 823, 65534))
_RTN_UNICAST, _RTN_LOCAL = 1, 2
_ETHERTYPE: dict[int, bytes] = {socket.AF_INET: b"\x08\x00", socket.AF_INET6: b"\x86\xdd"}

_NO_ROUTE = "no route"
_MULTICAST = "it is a multicast address"
_UNANSWERED = "the neighbour does not answer"
_TABLE_FULL = "the kernel's neighbour table is full"
# What the kernel says of a destination, as an errno (most) or as a route type (the rest).
_ROUTE_ERRORS = {
    errno.EINVAL: "its route is a blackhole",
    errno.EHOSTUNREACH: "its route says unreachable",
    errno.EACCES: "its route says prohibit",
}
_ROUTE_TYPES = {
    3: "it is a broadcast address",
    5: _MULTICAST,
    6: "its route is a blackhole",
    7: "its route says unreachable",
    8: "its route says prohibit",
}


class _Unusable(Exception):
    """Why a hop cannot be used now; internal."""


def _is_pinned(entry: rt.Entry) -> bool:
    """Whether somebody else keeps this entry: an administrator, a routing daemon, the kernel.

    NTF_USE must leave it alone then, for it would take exactly that property away: any
    RTM_NEWNEIGH sets or clears permanent, extern_learn and managed (Linux __neigh_update).
    """
    pinned = entry.state & (_NUD_NOARP | _NUD_PERMANENT) or entry.flags & _NTF_EXT_LEARNED
    return bool(pinned) or entry.extended


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
        self._requests = rt.Requests()
        self._events = rt.open_events()
        self._hops: dict[bytes, Hop] = {}
        self._unusable: set[Hop] = set()
        #: The neighbour on the way to a destination, and the Hops behind a neighbour.
        self._neighbours: dict[bytes, rt.Neighbour] = {}
        self._behind: dict[rt.Neighbour, set[Hop]] = {}
        #: To be looked at, the longest due first.
        self._due: OrderedDict[Hop, None] = OrderedDict()
        #: What the kernel has said in this slice: thousands of targets share a few of them.
        self._links: dict[int, rt.Link] = {}
        self._macs: dict[rt.Neighbour, bytes | None] = {}
        self._looked_ns = 0
        self._refresh_at = self._retry_at = self._rested_at = 0
        #: How often anything but a neighbour has changed: devices, addresses, routes.
        self.changes = 0
        self.deadline_ns = NEVER_NS

    def fileno(self) -> int:
        """The socket on which the kernel tells of changes: when readable, call on_readable()."""
        return self._events.fileno()

    def close(self) -> None:
        """Close both sockets; the Hops stay as they are."""
        self._events.close()
        self._requests.close()

    def resolve(self, destination: bytes) -> Hop:
        """The Hop to ``destination`` (16 bytes, IPv4-mapped): always the same object.

        Never raises for a destination that cannot be reached: see ``usable``, ``trouble``.
        """
        hop = self._hops.get(destination)
        if hop is None:
            self.resolve_all((destination,))
            hop = self._hops[destination]
        return hop

    def resolve_all(self, destinations: Iterable[bytes]) -> list[Hop]:
        """Their Hops in order, one for each distinct destination."""
        self._forget_answers()
        hops = []
        for destination in dict.fromkeys(destinations):
            hop = self._hops.get(destination)
            if hop is None:
                hop = self._hops[destination] = Hop(destination)
                self._unusable.add(hop)
                self._look(hop)
            hops.append(hop)
        now_ns = time.monotonic_ns()
        if not self._refresh_at:
            self._refresh_at = now_ns + _REFRESH_NS
        self._retry_at = now_ns + _RETRY_NS
        self._schedule(now_ns)
        return hops

    def on_readable(self, _events: int = 0) -> None:
        """Something changed in the kernel's tables. Signature of a Loop callback."""
        everything = False
        try:
            for _ in range(_EVENTS_PER_CALL):
                data = self._events.recv(1 << 16)
                for kind, offset, length in rt.messages(data):
                    everything |= self._note(kind, data[offset : offset + length])
        except BlockingIOError:
            pass
        except OSError:  # ENOBUFS: events were lost, so anything may have changed
            self.changes += 1
            everything = True
        if everything:
            self._due.update(dict.fromkeys(self._hops.values()))
        if self._due:
            now_ns = time.monotonic_ns()
            at_ns = max(self._looked_ns + _SETTLE_NS, self._rested_at)
            if now_ns >= at_ns:
                self.tick(now_ns)
            else:
                self.deadline_ns = min(self.deadline_ns, at_ns)

    def _note(self, kind: int, message: bytes) -> bool:
        """Have the hops looked at that this event is about; True: any of them may be."""
        # Links, addresses, routes and rules change seldom: look. Neighbours change all the
        # time, most of them are not ours.
        if kind not in (rt.RTM_NEWNEIGH, rt.RTM_DELNEIGH):
            self.changes += 1
            return True
        hops = self._behind.get(rt.neighbour_of(message))
        if hops:
            self._due.update(dict.fromkeys(hops))
        return False

    def tick(self, now_ns: int) -> None:
        """Look at what is due: changed, in trouble, or not looked at for long. That keeps its
        neighbour entry alive."""
        if now_ns >= self._refresh_at:
            self._refresh_at = now_ns + _REFRESH_NS
            self._due.update(dict.fromkeys(self._hops.values()))
        if now_ns >= self._retry_at:
            self._retry_at = now_ns + _RETRY_NS
            self._due.update(dict.fromkeys(self._unusable))
        self._forget_answers()
        begin_ns = end_ns = time.monotonic_ns()
        while self._due and end_ns - begin_ns < _SLICE_NS:
            # on_change may resolve another destination, or have all looked at.
            self._look(self._due.popitem(last=False)[0])
            end_ns = time.monotonic_ns()
        self._rested_at = end_ns + _REST * (end_ns - begin_ns)
        self._schedule(now_ns)

    def look_at_all(self) -> None:
        """At once, however many there are: for who knows better than the events read so far."""
        self._forget_answers()
        for hop in list(self._hops.values()):
            self._look(hop)
        self._due.clear()
        self._schedule(time.monotonic_ns())

    def wait_usable(self, timeout_s: float) -> None:
        """For start-up: until every Hop resolved so far is usable; PycopyError if one is not."""
        end_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        while self._unusable:
            now_ns = time.monotonic_ns()
            if now_ns >= end_ns:
                raise self._failure(
                    next(hop for hop in self._hops.values() if hop in self._unusable)
                )
            next_ns = min(end_ns, max(self.deadline_ns, now_ns))
            if poll.poll((next_ns - now_ns) / 1e6 + 1):
                self.on_readable()
            now_ns = time.monotonic_ns()
            if now_ns >= self.deadline_ns:
                self.tick(now_ns)

    def _schedule(self, now_ns: int) -> None:
        self._looked_ns = now_ns
        if self._hops:
            self.deadline_ns = self._refresh_at
            if self._unusable:
                self.deadline_ns = min(self.deadline_ns, self._retry_at)
            if self._due:
                self.deadline_ns = min(self.deadline_ns, self._rested_at)

    def _forget_answers(self) -> None:
        self._links.clear()
        self._macs.clear()

    def _look(self, hop: Hop) -> None:
        before = hop._all()
        try:
            self._follow(hop)
        except _Unusable as reason:
            hop.usable = False
            hop.trouble = str(reason)
            if not self._unusable:
                self._retry_at = time.monotonic_ns() + _RETRY_NS
            self._unusable.add(hop)
        else:
            hop.usable = True
            hop.trouble = ""
            self._unusable.discard(hop)
        if self._on_change is not None and hop._all() != before:
            self._on_change(hop)

    def _follow(self, hop: Hop) -> None:
        """Bring ``hop`` up to date; what is not known any more keeps its last value."""
        route = self._route(hop)
        link = self._link(route.ifindex)
        hop.ifindex = route.ifindex
        hop.ifname = link.ifname
        hop.mtu = min(route.mtu, link.mtu) if route.mtu else link.mtu
        hop.source = route.source or _UNSPECIFIED
        if not link.flags & _IFF_UP:
            raise _Unusable(f"{hop.ifname} is down")
        if not link.flags & _IFF_LOWER_UP:
            raise _Unusable(f"{hop.ifname} has no carrier")
        if link.kind in _ARPHRD_L3:
            hop.l2 = b""
            return
        if link.kind not in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK):
            raise _Unusable(f"{hop.ifname} is neither Ethernet nor a plain IP device")
        if link.flags & (_IFF_NOARP | _IFF_LOOPBACK):
            mac = link.mac  # what the kernel itself writes then (arp_constructor)
        else:
            mac = self._neighbour_mac(self._neighbours[hop.destination])
        l2 = mac + link.mac + _ETHERTYPE[rt.family_of(hop.destination)]
        # wire.py knows a next hop by the identity of this object.
        if l2 != hop.l2:
            hop.l2 = l2

    def _route(self, hop: Hop) -> rt.Route:
        """The kernel's choice for ``hop`` (of several next hops, one); notes its neighbour."""
        neighbour = None
        try:
            if unmap_address(hop.destination).is_multicast:
                raise _Unusable(_MULTICAST)  # the kernel says so only where it has a route to it
            route = self._requests.route(hop.destination)
            if route.kind not in (_RTN_UNICAST, _RTN_LOCAL):
                raise _Unusable(_ROUTE_TYPES.get(route.kind, _NO_ROUTE))
            neighbour = rt.Neighbour(route.ifindex, route.gateway or hop.destination)
        except OSError as problem:
            raise _Unusable(_ROUTE_ERRORS.get(problem.errno or 0, _NO_ROUTE)) from None
        finally:
            self._put_behind(hop, neighbour)
        return route

    def _put_behind(self, hop: Hop, neighbour: rt.Neighbour | None) -> None:
        before = self._neighbours.get(hop.destination)
        if neighbour == before:
            return
        if before is not None:
            del self._neighbours[hop.destination]
            self._behind[before].discard(hop)
            if not self._behind[before]:
                del self._behind[before]
        if neighbour is not None:
            self._neighbours[hop.destination] = neighbour
            self._behind.setdefault(neighbour, set()).add(hop)

    def _link(self, ifindex: int) -> rt.Link:
        link = self._links.get(ifindex)
        if link is None:
            try:
                link = self._links[ifindex] = self._requests.link(ifindex)
            except OSError:
                raise _Unusable("its interface is gone") from None
        return link

    def _neighbour_mac(self, neighbour: rt.Neighbour) -> bytes:
        if neighbour not in self._macs:
            self._macs[neighbour] = self._ask_mac(neighbour)
        mac = self._macs[neighbour]
        if mac is None:
            raise _Unusable(_UNANSWERED)
        return mac

    def _ask_mac(self, neighbour: rt.Neighbour) -> bytes | None:
        """None: it is not known, and the kernel has been asked to find out."""
        entry = self._requests.neighbour(neighbour)
        if entry is None or not _is_pinned(entry):
            try:
                self._requests.use(neighbour)
            except OSError as problem:
                if entry is None and problem.errno == errno.ENOBUFS:
                    raise _Unusable(_TABLE_FULL) from None
        if entry is None or not entry.state & _NUD_VALID or len(entry.mac) != 6:
            return None
        return entry.mac

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
        family = rt.family_of(neighbour.address)
        arp = "ARP" if family == socket.AF_INET else "neighbour discovery"
        if hop.trouble == _TABLE_FULL:
            version = 4 if family == socket.AF_INET else 6
            return PycopyError(
                f"{who}: {hop.trouble}",
                f"raise net.ipv{version}.neigh.default.gc_thresh3 (sysctl) above the"
                f" {len(self._behind):,} that are needed here",
            )
        if hop.trouble != _UNANSWERED:
            return PycopyError(f"{who}: {hop.trouble}", f"see `ip link show {hop.ifname}`")
        return PycopyError(
            f"{who} does not answer {arp} on {hop.ifname}",
            f"is it up, and on this network? see `ip neigh show dev {hop.ifname}`",
        )
