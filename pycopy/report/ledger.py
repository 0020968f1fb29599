"""The ledger: every captured segment and every response ends in exactly one named counter.

``captured = sum of the fates`` is checked by :meth:`Ledger.balance`. Whoever handles a
segment raises one fate (session/fates.py); everything that reports (exit summary, live view,
--json) reads :meth:`Ledger.snapshot` and nothing else.
"""

from pycopy.kernel.abi import CaptureCount, InterceptCount
from pycopy.process import memory
from pycopy.report.picture import BALANCED
from pycopy.session.fates import HOLD_BUCKETS_US, Count, Fate, ResponseFate, Tallies


class Ledger(Tallies):
    """All counters of one replay process. Only the data loop writes; anyone may read."""

    def __init__(self) -> None:
        super().__init__()
        #: Sums of the BPF programs' counters, refreshed by the driver.
        self.kernel_capture = [0] * len(CaptureCount)
        self.kernel_intercept: list[int] | None = None
        #: Responses that came over channels, and so through no ring of this host.
        self.by_channel = 0
        self.ring_pending_bytes = 0
        self.send_errors: dict[str, int] = {}
        self.active = 0
        #: What the kernel's own sessions did, in words; empty without them.
        self.fastpath: dict[str, int | float | str] = {}
        self.intercept_dropped = 0
        self._settled = False

    def settle(self) -> None:
        """Nothing is counted any more: from now on the snapshot says whether it balances."""
        self._settled = True

    def balance(self) -> list[str]:
        """Return what does not add up, in words; an empty list means balanced.

        Only meaningful while the data loop is not running, or at its rest points.
        """
        wrong = []
        captured, fates = self.counts[Count.CAPTURED], sum(self.fates)
        if captured != fates:
            wrong.append(f"captured {captured} segments, but their fates sum to {fates}")
        responses, ends = self.counts[Count.RESPONSES], sum(self.responses)
        if responses != ends:
            wrong.append(f"read {responses} responses, but their fates sum to {ends}")
        if self.ring_pending_bytes == 0:
            wrong += self._kernel_balance()
        return wrong

    def _kernel_balance(self) -> list[str]:
        wrong = []
        kernel = self.kernel_capture
        into_ring = kernel[CaptureCount.CAPTURED] + kernel[CaptureCount.KEPT]
        read = self.counts[Count.CAPTURED]
        if into_ring != read:
            wrong.append(f"the kernel captured {into_ring} segments, {read} were read")
        seen = kernel[CaptureCount.SELECTED] + kernel[CaptureCount.EXTRA_PIECES]
        ends = sum(kernel[CaptureCount.CAPTURED :])
        if seen != ends:
            wrong.append(f"the kernel selected {seen} segments, but their fates sum to {ends}")
        intercept, responses = self.kernel_intercept, self.counts[Count.RESPONSES]
        if intercept is not None:
            matched, ends = intercept[0], sum(intercept[1:])
            if matched != ends:
                wrong.append(f"the kernel matched {matched} responses, their fates sum to {ends}")
            recorded = sum(
                intercept[count]
                for count in (InterceptCount.CAPTURED, InterceptCount.TOO_BIG, InterceptCount.KEPT)
            )
            if recorded + self.by_channel != responses:
                wrong.append(
                    f"the kernel captured {recorded} responses, {self.by_channel} came by the"
                    f" channel, {responses} were read"
                )
        return wrong

    def lost(self) -> int:
        """Client segments with bytes to copy that will never reach the target."""
        fates = self.fates
        dropped = sum(
            fates[fate] for fate in Fate if fate.name.startswith(("DROPPED_", "REFUSED_"))
        )
        kernel = self.kernel_capture
        return dropped + kernel[CaptureCount.RING_FULL] + kernel[CaptureCount.LAPSED]

    def snapshot(self) -> dict[str, dict[str, int | float | str]]:
        """Sections of named numbers, for the view, the summary and --json."""
        counts, kernel = self.counts, self.kernel_capture
        sections: dict[str, dict[str, int | float | str]] = {
            "segments": {
                "captured": counts[Count.CAPTURED],
                **{fate.name.lower(): self.fates[fate] for fate in Fate},
                "lost_in_ring": kernel[CaptureCount.RING_FULL],
            },
            "responses": {
                "read": counts[Count.RESPONSES],
                **{fate.name.lower(): self.responses[fate] for fate in ResponseFate},
                "lost_in_intercept": self.intercept_dropped,
            },
            "sessions": {
                "active": self.active,
                "opened": counts[Count.SESSIONS],
                "mid_stream": counts[Count.MID_STREAM],
                "reopened": counts[Count.REOPENED],
                "port_taken": counts[Count.PORT_TAKEN],
                "established": counts[Count.ESTABLISHED],
                **{f"ended_{end.value}": number for end, number in self.outcomes.items()},
            },
            "sending": {
                "segments": counts[Count.SENT_SEGMENTS],
                "payload": counts[Count.SENT_PAYLOAD],
                "syn": counts[Count.SENT_SYN],
                "fin": counts[Count.SENT_FIN],
                "rst": counts[Count.SENT_RST],
                "ack": counts[Count.SENT_ACK],
                "retransmitted": counts[Count.RETRANSMITTED],
                "fast_retransmits": counts[Count.FAST_RETRANSMITS],
                "timeouts": counts[Count.TIMEOUTS],
                "window_probes": counts[Count.WINDOW_PROBES],
                "released_by_quiet": counts[Count.RELEASED_BY_QUIET],
                "repeated": counts[Count.REPEATED],
                "path_mtu": counts[Count.PATH_MTU],
                **{f"error_{name}": number for name, number in self.send_errors.items()},
            },
            "held_us": self._hold_section(),
            "kernel": {count.name.lower(): kernel[count] for count in CaptureCount},
            "familiar": self._familiar(),
        }
        if self._settled:
            sections["segments"][BALANCED] = "no" if self.balance() else "yes"
        if self.fastpath:
            sections["fastpath"] = dict(self.fastpath)
        if self.kernel_intercept is not None:
            sections["kernel_intercept"] = {
                count.name.lower(): self.kernel_intercept[count] for count in InterceptCount
            }
        sections["process"] = {"rss_mb": memory.rss_bytes() >> 20}
        return sections

    def _hold_section(self) -> dict[str, int | float | str]:
        names = [f"under_{bound}" for bound in HOLD_BUCKETS_US]
        names.append(f"from_{HOLD_BUCKETS_US[-1]}")
        return dict(zip(names, self.hold, strict=True))

    def _familiar(self) -> dict[str, int | float | str]:
        """Our counters under the names that users of tcpcopy grep its log for."""
        counts = self.counts
        return {
            "active": self.active,
            "conns": counts[Count.ESTABLISHED],
            "resp": counts[Count.RESPONSES],
            "c-resp": counts[Count.RESPONSE_PAYLOAD],
            "resp fin": counts[Count.RESPONSE_FIN],
            "resp rst": counts[Count.RESPONSE_RST],
            "send": counts[Count.SENT_SEGMENTS],
            "send content": counts[Count.SENT_PAYLOAD],
            "send syn": counts[Count.SENT_SYN],
            "send fin": counts[Count.SENT_FIN],
            "send reset": counts[Count.SENT_RST],
            "reconnect": counts[Count.REOPENED],
            "for no syn": counts[Count.MID_STREAM],
            "retransmit": counts[Count.RETRANSMITTED],
            "syn cnt": counts[Count.SYN],
            "all clt": counts[Count.CAPTURED],
            "clt cont": counts[Count.PAYLOAD],
            "frag": self.kernel_capture[CaptureCount.FRAGMENT],
            "total captured packets": self.kernel_capture[CaptureCount.SELECTED],
        }
