"""Runs the scripts of tests/sessions against both executors of the session rules at once.

The kernel's sessions (bpf/session.h, through the loaded programs) and the engine's
(pycopy/session) share the work as they do in ``pycopy replay``: a captured segment is a
frame that goes through capture.c, a response one through intercept.c, what the programs
leave to user space comes out of their rings, and a quiet session is given back. What either
sends must be what the script expects of the engine alone. That one runs beside them, and after
every line each session of the kernel's is held against its (states.py).

What BPF_PROG_TEST_RUN cannot take, user space gets as a record; :attr:`Pair.direct` counts it.
"""

from collections import Counter
from types import SimpleNamespace

from pycopy.fastpath.driver import SWEEP_NS, add_to
from pycopy.fastpath.handover import Keeper, adopt
from pycopy.fastpath.kernel import active
from pycopy.kernel import abi, syscall
from pycopy.kernel.abi import CaptureCount, FastCount, Left, Owner
from pycopy.session.fates import Fate
from pycopy.session.fields import KERNEL_SESSION, KernelSession, Known
from pycopy.session.rules import SECOND
from pycopy.session.states import State
from pycopy.wire.segment import KEY, KIND_CLIENT, KIND_TOO_BIG, OPT_TIMESTAMPS, RST, SYN
from tests.bpf.fastpath import OURS_L2, SLOTS
from tests.bpf.harness import TC_CONTINUE, TC_MAX_BYTES, TC_SHOT
from tests.bpf.segments import frame_of, read
from tests.bpf.states import Alone, Comparison, check_counts
from tests.sessions.runner import Failed, Script

TC_REDIRECT = 7
#: The kernel takes a clock of 0 for its own.
START_NS = 1

CLIENT_L2, TARGET_L2 = bytes(range(2, 14)), bytes(range(32, 44))
ETHERTYPE = {4: b"\x08\x00", 6: b"\x86\xdd"}

#: What the devices of a script take in one frame.
MSS = 1460

#: Rules that only the engine knows; none of them can be set by a user.
ENGINE_RULES = {"queue_segments", "queue_bytes"}


class Pair(Script):
    """One run of one script by both executors."""

    def __init__(self, text, family, programs, shuttle=False, only_sent=False):
        """``shuttle``: every session changes hands, there and back, after every line.

        ``only_sent``: do not compare states and outcomes.
        """
        self.shuttle, self.only_sent = shuttle, only_sent
        #: After the run: all segments were the kernel's, and no session left it.
        self.alone = False
        #: Until then: segments that were.
        self.in_kernel = 0
        self.programs, self.kernel = programs, programs.kernel
        programs.reset()
        super().__init__(text, family, addresses_of(family, next(programs.numbers)), START_NS,
            Keeper(self.kernel),
        )  # fmt: skip
        self.direct = 0  # what TEST_RUN cannot take
        self.user = Counter()  # segments that left the kernel, by kind
        self.idle_acks = Counter()  # which the capture does not even count as captured, by fate
        self.ended = False
        self.was_idle = False  # the client's last segment: no record, whoever has the session
        self.stamping = set()  # clients that sent timestamps in their SYN
        self.sweep_at = START_NS + SWEEP_NS
        self.second_at = START_NS + SECOND
        self.seen = self.kernel.counters()
        self.spare_slots = []
        self.kernel.set_clock(self.now_ns)
        self.kernel.configure(self.rules)
        self.kernel.set_closed(False)
        for service in range(2):
            hop = SimpleNamespace(
                ifindex=programs.ifindex, usable=True, l2=OURS_L2 + ETHERTYPE[family],
                source=bytes(16), destination=self.target_addr,
            )  # fmt: skip
            self.kernel.set_hop(service, hop, family, 80 + service, 1460)
        self._adopt, self.table._adopt = self.table._adopt, self.adopt
        #: The engine that runs alone beside, and what is compared with it.
        self.alone_engine = Alone(self, text)
        self.comparison = Comparison(
            lambda at: self.kernel._read_log(at)[0], self.alone_engine.table._lingering
        )
        self.stepped = 0

    def step(self, line):
        before = self.stepped
        super().step(line)
        if self.stepped == before:  # no line that stands for others
            self.stepped += 1
            self.alone_engine.step(line)
            self.compare_states()

    def compare_states(self):
        """Every session of the kernel's stands where the engine's stands."""
        if self.ended:
            return  # what lingers is left to itself
        self.comparison.check(self.kept(), self.alone_engine.table.by_target)
        check_counts(self.ledger, self.alone_engine.ledger)

    def adopt(self, found, now_ns):
        """The table goes on with a session of the kernel's: the connection is the same."""
        session = self._adopt(found, now_ns)
        if session is not None:
            self.latest(session.target_key).session = session
        return session

    def adopt_all(self, found):
        """What the timer, or somebody else's wish, hands over."""
        self.table.adopt_all((adopt(self.table, *each, self.now_ns) for each in found), self.now_ns)

    # -- the kernel's side ---------------------------------------------------------------------

    def refresh(self):
        """Bring the ledger up to date; how many frames were sent since the last time."""
        now = self.kernel.counters()
        grown = [new - old for new, old in zip(now, self.seen, strict=True)]
        self.seen = now
        add_to(self.ledger, grown)
        return grown[FastCount.OUT_SEGMENTS]

    def take(self, redirected=()):
        """Write down what the programs have sent."""
        sent = self.refresh() - len(redirected)
        for frame in (*self.programs.frames(sent), *redirected):
            try:
                self.write_frame(read(frame))
            except AssertionError as error:
                raise Failed(f"{error}: {frame.hex()}") from None

    def write_frame(self, frame):
        if frame.l2[:12] != OURS_L2 or frame.wnd != 0xFFFF:
            raise Failed(f"not a copy's headers: {frame}")
        client, _, port, target_port = KEY.unpack(frame.key)
        online_key = KEY.pack(client, self.server, port, 8000 + target_port)
        connection = self.latest(frame.key)
        is_new = frame.flags & SYN and (connection is None or frame.seq != connection.syn)
        if is_new:
            connection = self.connect(None, online_key, frame.key, frame.seq)
            connection.syn = frame.seq
        elif connection is None:
            raise Failed(f"sent by no connection: {frame}")
        self.write(connection, frame.flags, frame.seq, frame.ack, frame.options, frame.data)

    def latest(self, target_key):
        found = [each for each in self.connections if each.key == target_key]
        return found[-1] if found else None

    def connection_of(self, session, seq):
        connection = super().connection_of(session, seq)
        if not hasattr(connection, "syn"):
            connection.syn = seq
        return connection

    def session_of(self, key):
        """The kernel's session that has the connection to the target, if it has."""
        maps = self.kernel.maps.by_name
        flow = maps["targets"].lookup(key)
        slot, generation = abi.FLOW.unpack(flow) if flow else (abi.NO_SLOT, 0)
        if slot == abi.NO_SLOT:
            return None
        state = maps["sessions"].lookup(slot.to_bytes(4, "little"))
        session = KernelSession(*KERNEL_SESSION.unpack(state))
        kept = session.owner in (Owner.KERNEL, Owner.LEAVING)
        return session if kept and session.generation == generation else None

    def kept(self):
        """All sessions that the kernel has now."""
        keys = {connection.key for connection in self.connections}
        return [session for session in map(self.session_of, keys) if session is not None]

    # -- time ----------------------------------------------------------------------------------

    def advance(self, until_ns):
        while (due_ns := self.next_deadline()) <= until_ns:
            self.now_ns = max(self.now_ns, due_ns)
            self.turn()
        self.now_ns = until_ns
        self.kernel.set_clock(until_ns)

    def next_deadline(self):
        """The engine's, or any time at which the kernel's timer could have something to do."""
        rules = self.rules
        times = [self.table.deadline_ns(), self.sweep_at]
        if self.kernel._leaving or self.kernel._gone:
            times.append(self.second_at)
        for each in self.kept():
            quiet_ns = min(max(4 * each.srtt_ns, rules.quiet_ns), rules.quiet_max_ns)
            kernels = [each.ack_at, each.rto_at]
            kernels += [each.progress_ns + ns for ns in (quiet_ns, rules.quiet_max_ns)]
            times += [at for at in kernels if at > self.now_ns]
        return min(times)

    def turn(self):
        """As the driver's loop: time for both, then what is quiet goes back to the kernel."""
        self.kernel.set_clock(self.now_ns)
        if self.now_ns >= self.sweep_at:
            self.sweep_at = self.now_ns + SWEEP_NS
            self.kernel.sweep()
        found = list(self.kernel.on_timer())
        self.take()
        self.adopt_all(found)
        super().collect()
        if self.table.deadline_ns() <= self.now_ns:
            self.table.on_time(self.now_ns)
            super().collect()
        if self.now_ns >= self.second_at:
            self.second_at = self.now_ns + SECOND
            self.kernel.forget_released()
        self.table.give_back()
        self.kernel.forget_disowned(lambda: False)
        self.refresh()

    def collect(self):
        super().collect()
        if self.shuttle:
            self.adopt_all(self.kernel.fetch_all())
            super().collect()
        self.turn()

    # -- input ---------------------------------------------------------------------------------

    def on_client(self, seg, payload):
        if seg.tcp_flags & SYN and seg.options & OPT_TIMESTAMPS:
            self.stamping.add(seg.key)
        if seg.key in self.stamping and not seg.tcp_flags & RST:
            # RFC 7323 3.2: once negotiated, in every segment.
            seg = seg._replace(options=seg.options | OPT_TIMESTAMPS)
        frame = frame_of(seg, payload, CLIENT_L2)
        # A test run cannot make a super-segment that a device would cut.
        if len(payload) > MSS:
            self.direct += 1
            self.was_idle = False
            self.table.on_client(seg, payload, self.now_ns)
            return
        counts = self.programs.capture.maps["counts"]
        idle = counts.sum_percpu(CaptureCount.PURE_ACK)
        run = syscall.test_run(self.programs.capture.program_fd, frame)
        if (run.retval, run.data) != (TC_CONTINUE, frame):
            raise Failed(f"the client's packet did not pass unchanged: {run}")
        known = self.kernel.maps.by_name["flows"].lookup(seg.key) is not None
        idle = counts.sum_percpu(CaptureCount.PURE_ACK) - idle
        self.was_idle = bool(idle)
        self.idle_acks[Fate.STEERED if known else Fate.STRAY] += idle
        self.take()
        for record, data in self.programs.captured.drain(1 << 20):
            self.user[KIND_CLIENT] += 1
            self.table.on_client(record._replace(time_ns=self.now_ns), data, self.now_ns)

    def on_target(self, seg):
        if seg.kind == KIND_TOO_BIG:
            # As the program records it: tests/bpf/test_toobig.py.
            self.table.on_target(seg, self.now_ns)
            return
        frame = frame_of(seg, bytes(seg.seg_len), TARGET_L2)
        if len(frame) > TC_MAX_BYTES:
            self.direct += 1
            self.table.on_target(seg, self.now_ns)
            return
        run = syscall.test_run(self.programs.intercept.program_fd, frame, room_bytes=1 << 14)
        if run.retval == TC_REDIRECT:
            self.take([run.data])
        elif run.retval == TC_SHOT:
            self.take()
        elif run.retval == TC_CONTINUE and run.data == frame:
            # Of a connection that is forgotten: not a copy's any more.
            self.table.on_target(seg, self.now_ns)
        else:
            raise Failed(f"the verdict on a response is {run.retval}")
        for record, _ in self.programs.responses.drain(1 << 20):
            self.user[seg.kind] += 1
            self.table.on_target(record._replace(time_ns=self.now_ns), self.now_ns)

    def left(self):
        """Why sessions left the kernel."""
        counts = self.kernel.counters()[FastCount.LEFT :]
        return {why.name: counts[why] for why in Left if counts[why]}

    # -- lines with a star ---------------------------------------------------------------------

    def star_open(self, *words):
        self.alone_engine.advance(self.now_ns)
        super().star_open(*words)

    def star_rule(self, name, value):
        super().star_rule(name, value)
        self.kernel.configure(self.rules)
        if name in ENGINE_RULES:
            self.table.keeper = None
        if self.rules.sample_percent < 100 or self.rules.ramp or name in ENGINE_RULES:
            self.kernel.set_closed(True)
        if name == "max_sessions":
            free = self.programs.slots()
            self.spare_slots += free[self.rules.max_sessions :]
            self.programs.add_slots(free[: self.rules.max_sessions])

    def star_closed_for(self, fate):
        super().star_closed_for(fate)
        self.kernel.set_closed(self.table.refusing is not None)

    def star_mss(self, size, number="1"):
        kept = self.session_of(self.connection(int(number)).key)
        if kept is None:
            super().star_mss(size, number)
        else:
            self.compare("mss", kept.mss, int(size))

    def star_overlapping(self, answer):
        kept = self.session_of(self.connections[0].key)
        if kept is None:
            super().star_overlapping(answer)
        else:
            self.compare("overlapping", bool(kept.known & Known.OVERLAP), answer == "yes")

    def star_lower_mss(self, mss):
        # Only what user space sends can be too big for the device: the kernel looks before.
        self.adopt_all(self.kernel.fetch_all())
        connection = self.connections[0]
        connection.session = self.table.by_target[connection.key]
        super().star_lower_mss(mss)

    def star_state(self, state, number="1"):
        if self.only_sent:
            return
        connection = self.connections[int(number) - 1]
        kept = self.session_of(connection.key)
        if kept is not None and connection is self.latest(connection.key):
            # At the end of a run what lingers is left to itself.
            is_in = "GONE" if self.ended else State(kept.state).name
            self.compare("state", is_in, state)
            return
        session = self.table.by_target.get(connection.key)
        if session is None or connection is not self.latest(connection.key):
            self.compare("state", "GONE", state)
            return
        connection.session = session
        super().star_state(state, number)

    def star_outcome(self, *words):
        if not self.only_sent:
            super().star_outcome(*words)

    def star_fate(self, name, number):
        super().star_fate(name, int(number) - self.idle_acks[Fate[name.upper()]])

    def star_busy(self, number):
        kept = sum(1 for each in self.kept() if each.held or each.snd_nxt != each.snd_una)
        self.compare("busy", self.table.busy() + kept, int(number))

    def star_end(self):
        if not self.ended:
            now = self.kernel.counters()
            self.in_kernel = now[FastCount.CLIENT] + now[FastCount.RESPONSES]
            self.alone = not (self.direct or self.user or now[FastCount.TAKEN])
        self.kernel.set_closed(True)
        self.adopt_all(self.kernel.fetch_all())
        super().star_end()
        self.ended = True

    def held(self):
        return super().held() + sum(each.held for each in self.kept())

    # -- the end -------------------------------------------------------------------------------

    def clean(self):
        """Nothing of this script may be left in the kernel, and nothing may be lost there."""
        self.now_ns += 10 * SECOND
        self.kernel.set_clock(self.now_ns)
        self.kernel.sweep()
        list(self.kernel.on_timer())
        self.kernel.forget_disowned(lambda: False)
        for _ in range(2):
            self.kernel.forget_released()
        left = [
            name
            for name in ("targets", "flows")
            if syscall.map_next_key(self.kernel.maps.by_name[name].fd, None, KEY.size) is not None
        ]
        free = self.programs.slots() + self.spare_slots
        self.programs.add_slots(free)
        if left or len(set(free)) != SLOTS or active(self.kernel.counters()):
            raise Failed(f"left in the kernel: {left}, {SLOTS - len(free)} slots")


def addresses_of(family, number):
    """Client, online server, target: the servers are this run's own, and no key occurs twice."""
    low = number.to_bytes(2, "big")
    if family == 4:
        mapped = bytes(10) + b"\xff\xff"
        return [mapped + bytes([10, 0, 0, 0]), *(mapped + bytes([10, n]) + low for n in (1, 2))]
    return [b"\xfc\x00" + bytes(14), *(b"\xfc" + bytes([n]) + bytes(12) + low for n in (1, 2))]
