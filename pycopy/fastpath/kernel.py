"""The kernel's sessions as the driver sees them: fetch one, give one back, keep time.

A session that is not the kernel's any more is fetched when a record of it comes (it leaves
because of a packet) or when the timer points at it. All that is done to a session goes
through a BPF program (bpf/fastpath.c), which holds the session's lock; what is in maps
only is changed from here. Nothing here knows the rules.

Tests: tests/unit/test_fastpath_driver.py, tests/bpf/test_conformance.py
"""

import struct
from collections.abc import Callable, Iterator, Sequence

from pycopy import loader
from pycopy.fastpath.handover import Logged, unfinished
from pycopy.fastpath.maps import Maps
from pycopy.host.nexthop import Hop
from pycopy.kernel import abi, objects, syscall
from pycopy.kernel.abi import FastConfig, FastCount, HopEntry, LogRecord
from pycopy.kernel.module import Module
from pycopy.session.addresses import Network, first_host, usable_hosts
from pycopy.session.fields import KERNEL_SESSION, KernelSession
from pycopy.session.leaving import Leaving
from pycopy.session.rules import Rules
from pycopy.wire.address import map_address
from pycopy.wire.segment import KEY

from . import maps as maps_module

#: The timer's steps in one call, and calls in one turn, for what is pending and for all.
STEPS = 64
CALLS = 256
SWEEP_CALLS = 16

#: What the timer makes its frames of: a packet of either family, long enough for its headers.
_MATERIAL = bytes(12) + b"\x08\x00" + bytes(114)

#: Longest chain of records that one session can have in the log and not acknowledged.
_CHAIN_MAX = 1 << 16

_PORT = struct.Struct("!H")
#: The halves of an address.
_HALVES = struct.Struct("!QQ")
_ZERO = bytes(4)


class KernelSessions:
    """Make it before the capture is loaded; the programs are loaded with :meth:`defines`."""

    def __init__(self, services: int, max_sessions: int, total_log_bytes: int = 0) -> None:
        self.maps = Maps(services, max_sessions, total_log_bytes)
        self._by_name = self.maps.by_name
        self._module: Module | None = None
        self._timer: syscall.RepeatedRun | None = None
        self._config = FastConfig()
        #: Slots of sessions that user space has fetched, by the key towards the target.
        self._fetched: dict[bytes, tuple[int, int]] = {}
        #: Connections online whose session is over, still entered as user space's own.
        self._disowned: dict[bytes, None] = {}
        #: Keys towards the target of sessions that are over: swallowed for a while yet.
        self._leaving = Leaving()
        #: Of which families it takes sessions back.
        self._accepted = frozenset({4, 6})
        #: Whether any session of the kernel's had something pending when time last passed.
        self.pending = False
        #: Whether one held a request back.
        self.holding = False
        #: How the pass over those goes on: it may take more calls than one turn has.
        self._passing: int = abi.TIMER_BEGIN
        #: How the pass over all of them goes on; 0: none is under way.
        self._sweeping = 0

    def load(self, l2_bytes: int) -> None:
        """Load the timer; from then on sessions may be opened."""
        self._module = loader.load(
            objects.name_of("fastpath", l2_bytes=l2_bytes, fastpath=True),
            given=self.maps.given, constants=self.maps.constants,
        )  # fmt: skip
        self._timer = syscall.RepeatedRun(
            self._module.program_fds["pycopy_timer"], _MATERIAL, STEPS
        )
        nobody = bytes(abi.SESSION_BYTES)
        for first in reversed(range(0, self.maps.slots, abi.FILL_SLOTS)):
            self._command(abi.FILL, first, 0, nobody)

    # -- what the programs are told -------------------------------------------------------

    def configure(self, rules: Rules) -> None:
        """The times and choices of the run."""
        self._write_config(
            self._config._replace(
                quiet_ns=rules.quiet_ns, quiet_max_ns=rules.quiet_max_ns,
                delayed_ack_ns=rules.delayed_ack_ns, rto_initial_ns=rules.rto_initial_ns,
                rto_min_ns=rules.rto_min_ns, rto_max_ns=rules.rto_max_ns,
                time_wait_ns=rules.time_wait_ns, response_idle_ns=rules.response_idle_ns,
                idle_ns=rules.idle_ns, timestamp_origin=rules.timestamp_origin,
                wait_for_response=int(rules.wait_for_response),
            )
        )  # fmt: skip

    def use_ports(self, ports: list[int]) -> None:
        """Copies leave from our own address, from these ports in turn."""
        table = self._by_name["ports"]
        for index, port in enumerate(ports):
            table.update(index.to_bytes(4, "little"), _PORT.pack(port))
        self._write_config(self._config._replace(ports=len(ports)))

    def use_pool(self, networks: Sequence[Network]) -> None:
        """Copies leave from addresses of these, as :class:`PooledAddresses` chooses them."""
        sizes = []
        for index, family in enumerate((4, 6)):
            of_family = [net for net in networks if net.version == family]
            first = index * (abi.POOL_NETWORKS + 1)
            before = 0
            for at, network in enumerate(of_family):
                high, low = _HALVES.unpack(map_address(network[first_host(network)]))
                self._put_pool(first + at, high, low, before)
                # Further than a hash of 32 bits reaches.
                before = min(before + usable_hosts(network), 1 << 32)
            self._put_pool(first + len(of_family), 0, 0, before)
            sizes.append(len(of_family))
        self._write_config(self._config._replace(pool4=sizes[0], pool6=sizes[1]))

    def _put_pool(self, index: int, high: int, low: int, before: int) -> None:
        value = abi.POOL.pack(high, low, before)
        self._by_name["pool"].update(index.to_bytes(4, "little"), value)

    def set_closed(self, closed: bool) -> None:
        """Whether the kernel opens no sessions: user space says why, segment by segment."""
        if self._config.closed != int(closed):
            self._write_config(self._config._replace(closed=int(closed)))

    def accept(self, families: frozenset[int]) -> None:
        """Take back sessions towards targets of these IP versions only."""
        self._accepted = families

    def set_clock(self, now_ns: int) -> None:
        """For tests: the time of all programs."""
        self._write_config(self._config._replace(now_ns=now_ns))

    def _write_config(self, config: FastConfig) -> None:
        self._config = config
        self._by_name["config"].update(_ZERO, abi.FAST_CONFIG.pack(*config))

    def set_hop(
        self, service: int, hop: Hop, family: int, port: int, mss: int, allowed: bool = True
    ) -> None:
        """The way to a service's target; not usable: its sessions leave the kernel."""
        usable = allowed and hop.usable and len(hop.l2) == 14
        entry = HopEntry(
            ifindex=hop.ifindex, usable=int(usable), family=family, mss=mss, l2=hop.l2[:14],
            target_port=_PORT.pack(port), source=hop.source, target=hop.destination,
        )  # fmt: skip
        self._by_name["hops"].update(service.to_bytes(4, "little"), abi.HOP.pack(*entry))

    # -- sessions change hands ------------------------------------------------------------

    def fetch_online(self, key: bytes) -> tuple[KernelSession, list[Logged]] | None:
        """The session of a connection online, from now on user space's; None: there is none."""
        return self._fetch(self._by_name["flows"].lookup(key))

    def fetch_target(self, key: bytes) -> tuple[KernelSession, list[Logged]] | None:
        """The same by its connection to the target."""
        return self._fetch(self._by_name["targets"].lookup(key))

    def _fetch(self, flow: bytes | None) -> tuple[KernelSession, list[Logged]] | None:
        if flow is None:
            return None
        slot, generation = abi.FLOW.unpack(flow)
        return self.fetch(slot, generation)

    def fetch(self, slot: int, generation: int) -> tuple[KernelSession, list[Logged]] | None:
        """The same by its slot."""
        if slot == abi.NO_SLOT:
            return None
        state = self._command(abi.TAKE, slot, generation, bytes(abi.SESSION_BYTES))
        if state is None:
            return None
        session = KernelSession(*KERNEL_SESSION.unpack(state))
        self._fetched[session.target] = (slot, generation)
        logged = self._logged(session, slot, generation)
        self._command(abi.HAVE, slot, generation, state)
        return session, logged

    def _command(self, request: int, slot: int, generation: int, state: bytes) -> bytes | None:
        """What came back with the session, or None if it was not done."""
        assert self._module is not None
        command = abi.COMMAND.pack(request, slot, generation, 0) + state
        run = syscall.test_run(self._module.program_fds["pycopy_control"], command, room_bytes=0)
        return None if run.retval else run.data[abi.COMMAND.size :]

    def _logged(self, session: KernelSession, slot: int, generation: int) -> list[Logged]:
        """What is in the log and not acknowledged, and the record before that, in order."""
        found: list[Logged] = []
        at = session.log_last
        while at and len(found) < _CHAIN_MAX:
            record, data = self._read_log(at)
            if record is None or (record.slot, record.generation) != (slot, generation):
                break
            found.append((record, data))
            if not unfinished(session, record):
                break
            at = record.before
        found.reverse()
        return found

    def _read_log(self, at: int) -> tuple[LogRecord | None, bytes]:
        log = self.maps.log
        cpu, offset = at >> abi.LOG_CPU_SHIFT, at & (1 << abi.LOG_CPU_SHIFT) - 1
        start = self.maps.log_at(cpu)
        head, tail, _ = abi.LOG_HEAD.unpack_from(log, start)
        if not tail <= offset < head:
            return None, b""
        start += abi.LOG_HEAD.size + (offset & self.maps.log_bytes - 1)
        record = LogRecord(*abi.LOG_RECORD.unpack_from(log, start))
        start += abi.LOG_RECORD.size
        return record, log[start : start + record.seg_len]

    def give(self, session: KernelSession) -> bool:
        """The kernel goes on with ``session``; False if it has no room for it, or no use."""
        if session.family not in self._accepted:
            return False
        slot, generation = self._fetched.get(session.target) or self._new_slot()
        if slot == abi.NO_SLOT:
            return False
        state = KERNEL_SESSION.pack(*session)
        if self._command(abi.GIVE, slot, generation, state) is None:
            return False
        self._fetched.pop(session.target, None)
        self._disowned.pop(session.online, None)
        flow = abi.FLOW.pack(slot, generation)
        self._by_name["flows"].update(session.online, flow)
        self._by_name["targets"].update(session.target, flow)
        return True

    def _new_slot(self) -> tuple[int, int]:
        top = syscall.stack_pop(self._by_name["slots"].fd, 4)
        if top is None:
            return abi.NO_SLOT, 0
        value = self._by_name["sessions"].lookup(top)
        assert value is not None
        return int.from_bytes(top, "little"), KERNEL_SESSION.unpack(value)[1]

    # -- sessions of user space's own -----------------------------------------------------

    def claim(self, target_key: bytes, over_lingering: bool = False) -> bool:
        """Enter a connection to the target that user space opens; False if the kernel has it.

        ``over_lingering``: one that is over, and only waits for what may come late, gives way.
        """
        targets, flow = self._by_name["targets"], abi.FLOW.pack(abi.NO_SLOT, 0)
        if syscall.map_insert(targets.fd, target_key, flow):
            return True
        if self._leaving.withdraw(target_key):
            self._drop_slot(target_key)
            targets.update(target_key, flow)
            return True
        lingers = targets.lookup(target_key) if over_lingering else None
        if lingers is None or not self._drop(*abi.FLOW.unpack(lingers)):
            return False
        targets.update(target_key, flow)
        return True

    def own_online(self, online_key: bytes) -> None:
        """The connection online has a session in user space."""
        self._disowned.pop(online_key, None)
        self._by_name["flows"].update(online_key, abi.FLOW.pack(abi.NO_SLOT, 0))

    def disown_online(self, online_key: bytes) -> None:
        """It has none any more. Until :meth:`forget_disowned` the kernel leaves it alone."""
        self._disowned[online_key] = None
        if len(self._disowned) > maps_module.DISOWNED_MAX:
            oldest = next(iter(self._disowned))
            del self._disowned[oldest]
            self._by_name["flows"].delete(oldest)

    def forget_disowned(self, is_unread: Callable[[], bool]) -> None:
        """The kernel may open these connections anew. Call it when every record is read.

        A connection that was recorded for user space must not be opened after the kernel has
        opened the next one from the same port; ``is_unread`` says if one came meanwhile.
        """
        flows = self._by_name["flows"]
        for online_key in list(self._disowned):
            flows.delete(online_key)
            if is_unread():
                syscall.map_insert(flows.fd, online_key, abi.FLOW.pack(abi.NO_SLOT, 0))
                return
            del self._disowned[online_key]

    def release(self, target_key: bytes) -> None:
        """The connection to the target is over; its late segments are swallowed for a while."""
        self._leaving.add(target_key)

    def forget_released(self) -> None:
        """Call once a second: forget what was released before the last call."""
        for target_key in self._leaving.forget():
            self._by_name["targets"].delete(target_key)
            self._drop_slot(target_key)

    def _drop_slot(self, target_key: bytes) -> None:
        fetched = self._fetched.pop(target_key, None)
        if fetched is not None:
            self._drop(*fetched)

    def _drop(self, slot: int, generation: int) -> bool:
        command = abi.DROP, slot, generation, bytes(abi.SESSION_BYTES)
        return slot != abi.NO_SLOT and self._command(*command) is not None

    # -- time, and what it shows ----------------------------------------------------------

    def on_timer(self) -> Iterator[tuple[KernelSession, list[Logged]]]:
        """Let time pass for the kernel's sessions; those that must leave come back, fetched."""
        mark = seen = self._run_timer(self._passing, CALLS)
        self.pending, self.holding = bool(mark & abi.TIMER_PENDING), bool(mark & abi.TIMER_HELD)
        # Begun anew each time, a busy kernel's last sessions would never be looked at.
        mark &= ~abi.TIMER_SEEN
        self._passing = abi.TIMER_BEGIN if mark == abi.TIMER_DONE else mark
        if self._sweeping:
            mark = self._run_timer(self._sweeping, SWEEP_CALLS)
            seen |= mark
            mark &= ~abi.TIMER_SEEN
            self._sweeping = 0 if mark == abi.TIMER_DONE else mark
        if not seen & abi.TIMER_ATTENTION:
            return
        attention = self._by_name["attention"].fd
        for _ in range(maps_module.ATTENTION_MAX):
            entry = syscall.stack_pop(attention, abi.ATTENTION.size)
            if entry is None:
                break
            fetched = self.fetch(*abi.ATTENTION.unpack(entry))
            if fetched is not None:
                yield fetched

    def sweep(self) -> None:
        """Have all sessions looked at for the long limits, some with each turn of the timer."""
        self._sweeping = self._sweeping or abi.TIMER_BEGIN_ALL

    def _run_timer(self, mark: int, calls: int) -> int:
        """Some steps of a pass; ``mark`` says of which, what is returned how it goes on."""
        assert self._timer is not None
        for _ in range(calls):
            mark = self._timer.run(mark)
            if mark & ~abi.TIMER_SEEN == abi.TIMER_DONE:
                break
        return mark

    def fetch_all(self) -> Iterator[tuple[KernelSession, list[Logged]]]:
        """Everything that the kernel still has; what lingers after its end is left there."""
        targets = self._by_name["targets"]
        key, keys = None, []
        while (key := syscall.map_next_key(targets.fd, key, KEY.size)) is not None:
            keys.append(key)
        for key in keys:
            fetched = self.fetch_target(key)
            if fetched is not None:
                yield fetched

    def counters(self) -> list[int]:
        """``enum pycopy_fast_count``, summed over the CPUs."""
        value = self._by_name["fast_counts"].lookup(_ZERO)
        assert value is not None
        words = memoryview(value).cast("Q")
        return [sum(words[index :: abi.FAST_COUNTS]) for index in range(abi.FAST_COUNTS)]

    def now_active(self) -> int:
        """Open sessions that the kernel has now."""
        return active(self.counters())

    def close(self) -> None:
        """Give up the maps; what is attached keeps them until it is detached."""
        if self._module is not None:
            self._module.close()
        self.maps.close()


def active(counts: list[int]) -> int:
    """Open sessions that the kernel had when it counted ``counts``."""
    return (
        counts[FastCount.OPENED] + counts[FastCount.GIVEN]
        - counts[FastCount.TAKEN] - counts[FastCount.CLOSED]
    )  # fmt: skip
