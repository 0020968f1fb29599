"""Where the target's responses come from, by placement; the session engine does not know.

:class:`~pycopy.responses.here.ResponsesHere` swallows them on this host (zero-route mode); where
they come from ``pycopy intercept`` on other hosts, elsewhere.py has them. Both choose the addresses
copies leave from, are told by the session table which connections are copies, and hand every
response to the driver.

Tests: tests/unit/test_elsewhere.py
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from pycopy.host.nexthop import Hop
from pycopy.session.addresses import Addresses, Network
from pycopy.session.owner import Owner
from pycopy.tap import Kept, Tap
from pycopy.wire.segment import Segment

Targets = list[tuple[bytes, int]]


class Listener(Protocol):
    """Whom responses are handed to, and what becomes of their way: the driver."""

    def on_response_ring(self, tap: Tap, events: int) -> None:
        """The ring of a program on this host has some."""

    def on_records(self, records: list[Segment]) -> None:
        """These came over a channel."""

    def on_taken(self, target_keys: Iterable[bytes]) -> None:
        """An intercept: of the connections claimed, these are another replay's."""

    def live_claims(self) -> Iterable[bytes]:
        """All connections to the target (KEY), for an intercept that knows none of them."""

    def on_way_change(self) -> None:
        """Look again at ``silenced`` and ``why_not_relayed``."""

    def on_bye(self) -> None:
        """An intercept is about to leave: until this returns, responses are swallowed."""


class Kernel(Protocol):
    """The kernel that keeps sessions as well (fastpath/kernel.py), and opens them by itself."""

    @property
    def maps(self) -> Kept: ...

    def use_ports(self, ports: list[int]) -> None: ...

    def use_pool(self, networks: Sequence[Network]) -> None: ...


class Responses(Owner, Protocol):
    """What the driver asks of either. ``start`` may raise PycopyError; ``close`` undoes it all."""

    #: Local programs and their rings; empty if there are none here.
    taps: list[Tap]
    #: What to look at when no response comes at all.
    hints: str

    @property
    def addresses(self) -> Addresses:
        """What copies leave from."""

    @property
    def families(self) -> frozenset[int]:
        """IP versions of which responses can come straight to the kernel."""

    @property
    def silenced(self) -> bool:
        """Responses could reach real clients now: nothing may be sent."""

    @property
    def why_not_relayed(self) -> str:
        """Why responses do not come straight to the kernel now; empty: they do."""

    @property
    def deadline_ns(self) -> int:
        """When :meth:`on_timer` has something to do."""

    @property
    def dropped(self) -> int:
        """Responses that were lost on their way to us, as far as it is known."""

    def start(self) -> None:
        """Attach what swallows them here, or connect to those who do elsewhere."""

    def catch_up(self) -> None:
        """Everything is loaded, which may have taken its time: be ready when this returns."""

    def describe(self) -> str: ...

    def flush(self) -> None: ...

    def on_timer(self, now_ns: int) -> None: ...

    def on_hop_change(self, hop: Hop) -> None:
        """The way to a target has changed."""

    def forget_released(self) -> None:
        """Once a second."""

    def watch(self) -> None:
        """Devices have come or gone."""

    def close(self) -> None: ...
