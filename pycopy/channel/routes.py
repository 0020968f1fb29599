"""Whose response is it: ranges and claimed sessions of all connected replays.

Knows keys, addresses and tokens for replays; neither sockets nor the kernel's claims (what
is swallowed is verdicts.py's business, and outlives the replay that asked for it).
"""

from collections.abc import Iterable
from itertools import islice
from typing import Generic, TypeVar

from pycopy.channel.codec import Range

#: Sessions claimed at once, over all replays (about 200 bytes each).
MAX_CLAIMS = 1_000_000
#: Destinations whose range has been looked up already.
_MAX_KNOWN = 65536

Peer = TypeVar("Peer")


class Routes(Generic[Peer]):
    """The server's hot path reads ``by_addr``, ``claims`` and ``per_session`` itself."""

    def __init__(self, max_claims: int = MAX_CLAIMS) -> None:
        self._max_claims = max_claims
        self._ranges: dict[Range, tuple[Peer, ...]] = {}
        self._claimed: dict[Peer, int] = {}
        #: Destination address to the replays with the longest range around it (maybe none).
        self.by_addr: dict[bytes, tuple[Peer, ...]] = {}
        #: Session key to the replay that claimed it first.
        self.claims: dict[bytes, Peer] = {}
        #: Replays without ranges: what nobody claims may be any of theirs.
        self.per_session: tuple[Peer, ...] = ()
        self.evicted = 0
        #: Claims of what was another replay's.
        self.refused = 0

    @property
    def has_ranges(self) -> bool:
        """True while any replay that is connected has named ranges."""
        return bool(self._ranges)

    def add(self, replay: Peer, ranges: Iterable[Range]) -> None:
        """A replay is here: its ``ranges``, or none if it claims session by session."""
        ranges = tuple(dict.fromkeys(ranges))
        for item in ranges:
            self._ranges[item] = (*self._ranges.get(item, ()), replay)
        if not ranges:
            self.per_session = (*self.per_session, replay)
        self._claimed[replay] = 0
        self.by_addr.clear()

    def remove(self, replay: Peer) -> None:
        """A replay is gone: forget its ranges and its claims."""
        for item, owners in list(self._ranges.items()):
            rest = tuple(owner for owner in owners if owner is not replay)
            if rest:
                self._ranges[item] = rest
            else:
                del self._ranges[item]
        self.per_session = tuple(other for other in self.per_session if other is not replay)
        self.by_addr.clear()
        # The table may be large and replays come and go: only look through it if need be.
        if self._claimed.pop(replay, 0):
            for key in [key for key, owner in self.claims.items() if owner is replay]:
                del self.claims[key]

    def claim(self, replay: Peer, keys: Iterable[bytes]) -> list[bytes]:
        """Returns those keys that are another replay's, and remain so.

        The clients of two online hosts may well have the same address and port; the target
        cannot tell such connections apart, so the later one needs another port.
        """
        claims = self.claims
        before = len(claims)
        taken = [key for key in keys if claims.setdefault(key, replay) is not replay]
        self._claimed[replay] += len(claims) - before
        self.refused += len(taken)
        if len(claims) > self._max_claims:
            self._evict()
        return taken

    def release(self, replay: Peer, keys: Iterable[bytes]) -> None:
        """Forget these claims (keys of 36 bytes), as far as they are this replay's."""
        claims = self.claims
        for key in keys:
            if claims.get(key) is replay:
                del claims[key]
                self._claimed[replay] -= 1

    def owners_by_range(self, addr: bytes) -> tuple[Peer, ...]:
        """The replays with the longest range around ``addr`` (16 bytes); empty: there is none.

        Remembered in ``by_addr``, because a destination is asked for many times.
        """
        number = int.from_bytes(addr, "big")
        best: tuple[Peer, ...] = ()
        longest = -1
        for (start, bits), owners in self._ranges.items():
            shift = 128 - bits
            if bits > longest and number >> shift == int.from_bytes(start, "big") >> shift:
                best, longest = owners, bits
        if len(self.by_addr) >= _MAX_KNOWN:
            self.by_addr.clear()
        self.by_addr[addr] = best
        return best

    def _evict(self) -> None:
        # Oldest first, many at once: finding a dict's first key walks over its deleted ones.
        count = len(self.claims) - self._max_claims + self._max_claims // 64
        for key in list(islice(self.claims, count)):
            self._claimed[self.claims.pop(key)] -= 1
        self.evicted += count
