from pycopy.kernel.abi import CaptureCount, InterceptCount
from pycopy.report.ledger import Ledger
from pycopy.session.fates import Count, Fate, ResponseFate


def balanced():
    ledger = Ledger()
    ledger.counts[Count.CAPTURED] = 10
    ledger.fates[Fate.SENT], ledger.fates[Fate.DUPLICATE] = 7, 3
    ledger.counts[Count.RESPONSES] = 4
    ledger.responses[ResponseFate.STEERED] = 4
    kernel = ledger.kernel_capture
    kernel[CaptureCount.SELECTED], kernel[CaptureCount.EXTRA_PIECES] = 14, 1
    kernel[CaptureCount.CAPTURED], kernel[CaptureCount.PURE_ACK] = 10, 5
    return ledger


def test_balanced():
    ledger = balanced()
    assert ledger.balance() == []
    ledger.kernel_intercept = [0] * len(InterceptCount)
    ledger.kernel_intercept[InterceptCount.MATCHED] = 6
    ledger.kernel_intercept[InterceptCount.CAPTURED] = 4
    ledger.kernel_intercept[InterceptCount.PASSED] = 2
    assert ledger.balance() == []


def test_each_imbalance_is_told():
    ledger = balanced()
    ledger.fates[Fate.SENT] += 1
    assert ledger.balance() == ["captured 10 segments, but their fates sum to 11"]
    ledger = balanced()
    ledger.responses[ResponseFate.EARLY] += 1
    assert ledger.balance() == ["read 4 responses, but their fates sum to 5"]
    ledger = balanced()
    ledger.kernel_capture[CaptureCount.CAPTURED] += 1
    assert len(ledger.balance()) == 2
    ledger.ring_pending_bytes = 1
    assert ledger.balance() == []
    ledger = balanced()
    ledger.kernel_intercept = [5, 3, 1, *[0] * (len(InterceptCount) - 3)]
    assert len(ledger.balance()) == 2
    ledger = balanced()
    ledger.kernel_intercept = [3, 3, *[0] * (len(InterceptCount) - 2)]
    assert len(ledger.balance()) == 1
    ledger.by_channel = 1
    assert ledger.balance() == []


def test_hold_times_fall_into_their_buckets():
    ledger = Ledger()
    for hold_us in 0, 99, 100, 9_999_999, 10_000_000, 10**12:
        ledger.held_for(hold_us * 1000)
    assert ledger.hold == [2, 1, 0, 0, 0, 1, 2]
    assert sum(ledger.snapshot()["held_us"].values()) == 6


def test_lost_counts_what_had_bytes_to_copy():
    ledger = balanced()
    assert ledger.lost() == 0
    ledger.fates[Fate.DROPPED_GAP] = 2
    ledger.fates[Fate.REFUSED_NO_ADDRESS] = 3
    ledger.fates[Fate.STEERED] = ledger.fates[Fate.OUTSIDE_WINDOW] = 9
    ledger.kernel_capture[CaptureCount.RING_FULL] = 5
    assert ledger.lost() == 10


def test_the_snapshot_has_every_fate_and_the_familiar_names():
    ledger = balanced()
    ledger.send_errors["EPERM"] = 2
    ledger.kernel_intercept = [0] * len(InterceptCount)
    sections = ledger.snapshot()
    assert {fate.name.lower() for fate in Fate} <= set(sections["segments"])
    assert sections["familiar"]["all clt"] == 10
    assert sections["sending"]["error_EPERM"] == 2
    assert set(sections["kernel_intercept"]) == {count.name.lower() for count in InterceptCount}
