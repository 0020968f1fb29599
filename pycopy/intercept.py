"""``pycopy intercept``: swallow the target's responses, hand their headers to the replays.

The driver: choose the placement, load and attach, wire ring to channel, end in order. What
is swallowed is verdicts.py's to say, what goes past the channel relays.py's, who gets the rest
the channel's, and nothing here looks into a record. Everything that needs undoing is on one
exit stack, detaching first.
"""

import contextlib
import os
import signal
import socket
import time
from functools import partial

from pycopy.channel import ChannelServer, Fate, Hello, Placement, Refusal
from pycopy.command.config import InterceptConfig
from pycopy.errors import EXIT_FAILED, EXIT_OK, PycopyError
from pycopy.host.devices import Device, find_devices, local_addresses
from pycopy.interception import placement
from pycopy.interception.relays import Relays
from pycopy.interception.verdicts import NoRoom, Verdicts, describe
from pycopy.kernel.abi import PASS, InterceptCount
from pycopy.kernel.attach import Hook
from pycopy.kernel.heartbeat import Heartbeat
from pycopy.kernel.module import Map
from pycopy.process import console, daemon
from pycopy.process.life import Life, Phase
from pycopy.process.loop import READ, Loop
from pycopy.process.signals import Signals
from pycopy.report.picture import BALANCED, Value
from pycopy.report.view import View
from pycopy.tap import Settings, Tap, choose_transport, load_tap

#: At TC both are before the host's own forwarding. XDP is cheaper on a real NIC, but sends
#: nothing on from there.
_HOOKS = {
    (Placement.ASSISTANT, "tc"): (Hook.TC_INGRESS,),
    (Placement.ASSISTANT, "xdp"): (Hook.XDP, Hook.TC_INGRESS),
    (Placement.TARGET, "tc"): (Hook.TC_EGRESS,),
    (Placement.TARGET, "xdp"): (Hook.TC_EGRESS,),
}

#: Records taken from a ring before anybody else gets a turn.
_DRAIN_RECORDS = 4096
#: Shortest time between two turns of the loop: under load what arrives meanwhile is one
#: frame, which saves a wake-up and a send per response. The first after a pause never waits.
_COALESCE_NS = 300_000
#: Heart-beats are looked after at least this often.
_TICK_NS = 250_000_000
#: How often an assistant looks whether it has become the target.
_LOOK_NS = 1_000_000_000
#: At the end: for the replays to stop sending, and leave.
_LEAVE_S = 1.0
#: Then: for what the target still answers to what they sent last.
_SETTLE_NS = 100_000_000
#: After detaching: for what is in the rings.
_LAST_DRAIN_NS = 1_000_000_000

_RTMGRP_LINK = 1


class Intercept:
    """One run, from configuration to exit status."""

    def __init__(self, config: InterceptConfig, stack: contextlib.ExitStack) -> None:
        self._config = config
        self._stack = stack
        self.view = View(
            self.snapshot, config.interval_s, config.quiet, config.json,
            f"pycopy intercept {config.filter}",
        )  # fmt: skip
        self._heartbeat = Heartbeat()
        stack.callback(self._heartbeat.close)
        self._loop = Loop(self._heartbeat.beat)
        stack.callback(self._loop.close)
        self._taps: list[Tap] = []
        self._verdicts = Verdicts()
        self._relays = Relays(self._loop, self._verdicts, _log)
        self._life = Life()
        self._failure: PycopyError | None = None
        self._read = 0
        #: Set once everything is at rest: from then on the numbers must balance.
        self._final_counts: list[int] | None = None

    def run(self) -> int:
        config = self._config
        devices = find_devices(config.interfaces)
        own = local_addresses()
        #: By which listeners and addresses the placement was chosen.
        self._judged = placement.listeners(), own
        self._place, why = placement.choose(config.placement, config.filter, *self._judged)
        # Before the programs: a busy port is known at once, and nothing is attached yet.
        self._server = ChannelServer(
            self._loop,
            config.bind,
            config.port,
            placement=self._place,
            instance=int.from_bytes(os.urandom(8), "little"),
            on_hello=self._on_hello,
            log=_log,
            on_welcome=self._relays.welcome,
            on_relay=self._relays.want,
            on_leave=self._relays.leave,
        )
        self._stack.callback(self._server.close, 0.0)
        others = {signal.SIGHUP: daemon.hang_up(self._end), signal.SIGUSR1: self.view.summary}
        signals = Signals(self._loop, self._end, others, starting=True)
        self._stack.callback(signals.close)
        _log(f"this is the {self._place.name.lower()}: {why}")
        self._watch_devices()
        self._heartbeat.open()
        self._transport = choose_transport(
            config.transport == "perf", config.ring_bytes, self._heartbeat
        )
        for device in devices:
            self._attach(device, _HOOKS[self._place, config.hook])
        self._verdicts.pass_addresses(own)
        self._verdicts.pass_networks(config.pass_nets)
        self._stack.callback(self._relays.close)
        for tap in self._taps:
            self._put_to_use(tap)
        self._heartbeat.begin()
        signals.started()
        console.say(f"ready: waiting for replays on port {self._server.port}")
        daemon.ready()
        self.view.start()
        try:
            self._serve()
        finally:
            self.view.stop()
        return self._finish()

    def _serve(self) -> None:
        woken_ns = timers_ns = look_ns = 0
        self._life.begin()
        while self._life.phase is Phase.RUNNING:
            if (rest_ns := woken_ns + _COALESCE_NS - time.monotonic_ns()) > 0:
                time.sleep(rest_ns / 1e9)
            self._loop.wait(timers_ns)
            woken_ns = time.monotonic_ns()
            if woken_ns >= look_ns:
                look_ns = woken_ns + _LOOK_NS
                self._look_again()
                self._notice_lapse()
            if woken_ns >= timers_ns:
                self._server.on_timer(woken_ns)
                self._relays.on_timer(woken_ns)
                timers_ns = min(self._server.deadline_ns, woken_ns + _TICK_NS)

    def _notice_lapse(self) -> None:
        """We stood still; the programs went on, and let everything pass after a while."""
        missed_ns = self._heartbeat.take_lapse()
        if missed_ns:
            passed = self._kernel_counts()[InterceptCount.LAPSED]
            _log(
                f"this process stood still for {missed_ns / 1e9:.1f} s (stopped, or without a CPU);"
                f" {passed} responses were let through since the start for such a reason"
            )

    def _look_again(self) -> None:
        """The target's service may have been started after us: then its responses leave here."""
        config = self._config
        if config.placement != "auto" or self._place is Placement.TARGET:
            return
        here = placement.listeners(), local_addresses()
        if here == self._judged:
            return
        self._judged = here
        self._place, why = placement.choose("auto", config.filter, *here)
        if self._place is not Placement.TARGET:
            return
        _log(f"this is the target now: {why}")
        before = len(self._taps)
        try:
            for device in find_devices(config.interfaces):
                self._attach(device, _HOOKS[Placement.TARGET, config.hook])
        except PycopyError as error:
            _log(f"its answers are not intercepted: {error}")
        for tap in self._taps[before:]:
            self._put_to_use(tap)

    def _put_to_use(self, tap: Tap) -> None:
        self._loop.add(tap.ring.fileno(), READ, partial(self._drain, tap))
        if "relays" in tap.module.maps and tap.l2_bytes:
            self._relays.add_map(tap.module.maps["relays"])

    def _drain(self, tap: Tap, _events: int = READ) -> None:
        records = list(tap.ring.drain_raw(_DRAIN_RECORDS))
        self._read += len(records)
        self._server.forward(records)

    def _end(self) -> None:
        self._life.stop()

    def _finish(self) -> int:
        """Say goodbye, swallow what the replays still cause, detach, give account."""
        self._server.close(_LEAVE_S)
        settled_ns = time.monotonic_ns() + _SETTLE_NS
        while time.monotonic_ns() < settled_ns:
            self._loop.wait(settled_ns)
        for tap in self._taps:
            tap.detach()
        until_ns = time.monotonic_ns() + _LAST_DRAIN_NS
        for tap in self._taps:
            self._loop.remove(tap.ring.fileno())
            while tap.ring.pending_bytes() and time.monotonic_ns() < until_ns:
                self._drain(tap)
        self._final_counts = self._kernel_counts()
        self._life.enter(Phase.FINISHED)
        wrong = self.balance()
        for line in wrong:
            _log(f"the ledger does not balance: {line}")
        self.view.summary()
        if self._failure is not None:
            raise self._failure
        return EXIT_FAILED if wrong else EXIT_OK

    # --- programs and devices ---

    def _attach(self, device: Device, hooks: tuple[Hook, ...]) -> None:
        reasons = []
        for hook in hooks:
            if hook is Hook.XDP and not device.l2_bytes:
                reasons.append(f"XDP needs Ethernet, {device.name} has none")
                continue
            tap = self._tap(hook, device.l2_bytes)
            try:
                attachment = tap.attach(device.name)
            except PycopyError as error:
                if hook is hooks[-1]:
                    raise
                reasons.append(error.cause)
                continue
            if attachment.reason:
                reasons.append(attachment.reason)
            why = f" ({'; '.join(reasons)})" if reasons else ""
            _log(f"{device.name}: {hook.value}, {attachment.how}{why}")
            return

    def _tap(self, hook: Hook, l2_bytes: int) -> Tap:
        """One program for all devices of one kind at one hook."""
        for tap in self._taps:
            if (tap.hook, tap.l2_bytes) == (hook, l2_bytes):
                return tap
        config = self._config
        settings = Settings(
            channel_port=self._server.port,
            # TC_ACT_SHOT would tell the target's TCP, which would send again on the spot.
            # TC_ACT_STOLEN does not, but TCX takes it for "next program" and the packet leaves.
            # A redirect to no device does what is wanted: the packet is freed, and the sender
            # hears NET_XMIT_SUCCESS (net/core/dev.c, sch_handle_egress).
            redirect_away=hook is Hook.TC_EGRESS,
        )
        tap = load_tap(
            "intercept", l2_bytes, hook, self._transport, settings, Tap, expression=config.filter
        )
        self._stack.callback(tap.close)
        self._taps.append(tap)
        self._verdicts.add(_verdicts_of(tap))
        return tap

    def _watch_devices(self) -> None:
        events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
        )
        self._stack.callback(events.close)
        events.bind((0, _RTMGRP_LINK))

        def on_event(_events: int) -> None:
            # Whatever it says, or ENOBUFS: something has changed, so look.
            with contextlib.suppress(OSError):
                while events.recv(65536):
                    pass
            self._check_devices()

        self._loop.add(events.fileno(), READ, on_event)

    def _check_devices(self) -> None:
        for tap in self._taps:
            for name in tap.lose_dead():
                _log(f"{name} is gone, or the program detached: nothing is intercepted there now")
        if not any(tap.attachments for tap in self._taps):
            self._failure = PycopyError(
                "no network device is left to intercept on",
                "bring the device back and start pycopy intercept again",
            )
            self._end()

    # --- replays ---

    def _on_hello(self, hello: Hello, name: str) -> None:
        self._look_again()
        try:
            passing = self._verdicts.claim_ranges(hello.ranges)
        except NoRoom as error:
            raise Refusal(str(error)) from None
        what = ", ".join(describe(item) for item in hello.ranges)
        for item in passing:
            _log(f"{describe(item)} of replay {name} passes: it is this host's own, or in --pass")
        if not hello.ranges:
            what = "its clients one by one"
            if self._verdicts.default == PASS:
                _log("from now on every response that is not in --pass is swallowed")
            self._verdicts.claim_strangers()
        _log(f"replay {name} (pycopy {hello.version}) claims {what}")

    # --- ledger ---

    def _kernel_counts(self) -> list[int]:
        if self._final_counts is not None:
            return self._final_counts
        each = [tap.counters(len(InterceptCount)) for tap in self._taps]
        return [sum(counts) for counts in zip(*each, strict=True)]

    def balance(self) -> list[str]:
        """What does not add up, in words; only at rest, because the kernel counts on."""
        matched, *ends = kernel = self._kernel_counts()
        captured = kernel[InterceptCount.CAPTURED] + kernel[InterceptCount.TOO_BIG]
        fates = self._server.fates
        wrong = []
        if matched != sum(ends):
            wrong.append(f"the kernel matched {matched} responses, their fates sum to {sum(ends)}")
        if captured != self._read:
            wrong.append(f"the kernel captured {captured} responses, {self._read} were read")
        if self._read != sum(fates):
            wrong.append(f"{self._read} responses were read, their fates sum to {sum(fates)}")
        return wrong + self._server.balance()

    def snapshot(self) -> dict[str, dict[str, Value]]:
        """Sections of named numbers, for the view, the summary and --json."""
        kernel, fates = self._kernel_counts(), self._server.fates
        sections: dict[str, dict[str, Value]] = {
            "kernel": {count.name.lower(): kernel[count] for count in InterceptCount},
            "responses": {
                "read": self._read,
                **{fate.name.lower(): fates[fate] for fate in Fate},
            },
        }
        sections |= {name: dict(section) for name, section in self._server.snapshot().items()}
        if self._final_counts is not None:
            sections["responses"][BALANCED] = "no" if self.balance() else "yes"
        return sections


def run(config: InterceptConfig) -> int:
    """Intercept until told to end, or until no device is left; the exit status."""
    with contextlib.ExitStack() as stack:
        return Intercept(config, stack).run()


def _verdicts_of(tap: Tap) -> tuple[Map, Map]:
    return tap.module.maps["claims"], tap.module.maps["claims_default"]


def _log(text: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    console.say(f"{stamp} {text}")
