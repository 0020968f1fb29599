from pycopy.session import recovery
from pycopy.session.rules import MS, SECOND, Rules
from pycopy.session.views import NO_POSITION, Chunk, Target

RULES = Rules()


def target(segments, size=1000):
    """With so many segments in flight, from position 1."""
    made = Target(0, 1, size, SECOND)
    made.snd_una = made.snd_nxt = 1
    for _ in range(segments):
        made.flight.append(Chunk(made.snd_nxt, bytes(size), 0, 0, 0))
        made.snd_nxt += size
    return made


def acknowledge(mine, ack):
    acked, mine.snd_una = ack - mine.snd_una, ack
    recovery.on_new_ack(mine, acked)


def holes(mine):
    found = []
    while True:
        start, end = recovery.next_hole(mine)
        if start >= end:
            return found
        found.append((start, end))
        mine.resend_next = end


def test_rto_of_rfc_6298():
    mine = target(0)
    recovery.sample_rtt(mine, RULES, 100 * MS)
    assert (mine.srtt_ns, mine.rttvar_ns, mine.rto_ns) == (100 * MS, 50 * MS, 300 * MS)
    recovery.sample_rtt(mine, RULES, 180 * MS)
    assert mine.rttvar_ns == 50 * MS + (80 * MS - 50 * MS) // 4
    assert mine.srtt_ns == 110 * MS
    for _ in range(200):
        recovery.sample_rtt(mine, RULES, MS)
    assert mine.rto_ns == RULES.rto_min_ns
    recovery.sample_rtt(mine, RULES, 3600 * SECOND)
    assert mine.rto_ns == RULES.rto_max_ns


def test_a_timeout_halves_what_was_in_flight():
    """RFC 5681 3.1 equation 4, in whole bytes: what is sent is cut by it."""
    for segments, size, ssthresh in (10, 1000, 5000), (9, 1001, 4504), (3, 1000, 2000):
        mine = target(segments, size)
        recovery.on_timeout(mine, RULES)
        assert mine.ssthresh == ssthresh and isinstance(mine.ssthresh, int)


def test_fast_retransmit_halves_what_was_in_flight():
    for segments, size, ssthresh in (9, 1001, 4504), (4, 1000, 2000), (2, 1000, 2000):
        mine = target(segments, size)
        while not recovery.on_duplicate_ack(mine):
            pass
        assert mine.ssthresh == ssthresh and isinstance(mine.ssthresh, int)


def test_timeouts_back_off_to_the_maximum():
    mine = target(4)
    recovery.note_sack(mine, [(1001, 2001)])
    recovery.on_duplicate_ack(mine)
    recovery.on_timeout(mine, RULES)
    assert mine.dup_acks == 0 and mine.sacked == ()  # RFC 2018 8
    for _ in range(20):
        recovery.on_timeout(mine, RULES)
    assert mine.rto_ns == RULES.rto_max_ns and mine.cwnd == 1000 and mine.ssthresh == 2000
    assert holes(mine) == [(1, 1001)]


def test_the_window_grows_only_if_it_is_used():
    mine = target(2)
    before = mine.cwnd
    acknowledge(mine, 2001)
    assert mine.cwnd == before
    mine = target(5)  # a half of it is used: that is enough
    acknowledge(mine, 1001)
    assert mine.cwnd == before + 1000
    mine = target(4)
    acknowledge(mine, 1001)
    assert mine.cwnd == before
    mine = target(10)
    acknowledge(mine, 3001)
    assert mine.cwnd == before + 2000  # slow start, RFC 3465
    mine.ssthresh = 10_000
    acknowledge(mine, 5001)
    assert mine.cwnd == before + 2000 + 1000 * 2000 // 12_000  # congestion avoidance


def test_sack_is_merged_and_trimmed():
    mine = target(10)
    recovery.note_sack(mine, [(2001, 3001), (5001, 6001), (3001, 4001)])
    recovery.note_sack(mine, [(0, 500), (10_001, 10_002), (7001, 6001), (5501, 6501)])
    assert mine.sacked == ((2001, 4001), (5001, 6501))
    assert recovery.sacked_bytes(mine) == 3500 and recovery.in_flight_bytes(mine) == 6500
    acknowledge(mine, 3001)
    assert mine.sacked == ((3001, 4001), (5001, 6501))


def test_sack_of_the_last_byte_and_of_none():
    mine = target(10)
    recovery.note_sack(mine, [(5001, 5001), (9001, 10_001)])
    assert mine.sacked == ((9001, 10_001),)
    acknowledge(mine, 10_001)
    assert mine.sacked == ()


def test_sack_within_what_was_reported_changes_nothing():
    mine = target(10)
    recovery.note_sack(mine, [(2001, 5001)])
    recovery.note_sack(mine, [(3001, 4001)])
    assert mine.sacked == ((2001, 5001),)


def test_no_burst_at_the_end_of_recovery():
    """RFC 6582 3.2 step 3: min(ssthresh, max(FlightSize, SMSS) + SMSS)."""
    for flight_bytes, cwnd in (6000, 4000), (2500, 3500), (0, 2000):
        mine = target(8)
        while not recovery.on_duplicate_ack(mine):
            pass
        mine.snd_nxt += flight_bytes
        acknowledge(mine, 8001)
        assert mine.cwnd == cwnd


def test_a_report_far_ahead_does_not_widen_the_hole():
    mine = target(10)
    while not recovery.on_duplicate_ack(mine):
        pass
    recovery.note_sack(mine, [(5001, 6001)])
    assert holes(mine) == [(1, 1001)]


def test_fast_retransmit_repeats_holes_only():
    mine = target(10)
    recovery.note_sack(mine, [(1001, 2001), (3001, 4001)])
    assert not recovery.on_duplicate_ack(mine)
    recovery.note_sack(mine, [(5001, 6001)])
    assert recovery.on_duplicate_ack(mine)  # RFC 6675: more than two segments above the hole
    assert holes(mine) == [(1, 1001), (2001, 3001), (4001, 5001)]
    recovery.note_sack(mine, [(7001, 8001)])
    assert not recovery.on_duplicate_ack(mine)
    assert holes(mine) == [(6001, 7001)]


def test_partial_acks_show_the_next_hole():
    mine = target(8)
    assert [recovery.on_duplicate_ack(mine) for _ in range(4)] == [False, False, True, False]
    assert (mine.ssthresh, mine.cwnd, mine.recovery_end) == (4000, 7000, 8001)
    assert holes(mine) == [(1, 1001)]
    acknowledge(mine, 3001)
    assert holes(mine) == [(3001, 4001)]
    acknowledge(mine, 8001)
    assert mine.recovery_end == NO_POSITION and mine.cwnd == 2000
    assert mine.dup_acks == 0


def test_thresholds_for_few_segments():
    for segments, needed in (1, 3), (2, 1), (3, 2), (4, 3), (9, 3):
        mine = target(segments)
        answers = [recovery.on_duplicate_ack(mine) for _ in range(3)]
        assert answers.index(True) == needed - 1, segments


def test_small_segments_count_as_segments():
    mine = target(2, 100)
    mine.smss = 1000
    assert recovery.on_duplicate_ack(mine)


def test_what_was_sent_since_recovery_began_is_not_repeated():
    mine = target(4)
    while not recovery.on_duplicate_ack(mine):
        pass
    mine.snd_nxt += 2000
    acknowledge(mine, 3501)
    assert holes(mine) == [(3501, 4001)]


def test_a_super_segment_counts_as_what_the_kernel_makes_of_it():
    """RFC 5827 3.1 counts segments: one chunk of 1.5 MSS is two on the wire, of 2.5 three."""
    for size, needed in (1500, 1), (2500, 2), (3500, 3):
        mine = target(1, size)
        mine.smss = 1000
        answers = [recovery.on_duplicate_ack(mine) for _ in range(3)]
        assert answers.index(True) == needed - 1, size


def test_repetition_is_paced_by_the_window():
    mine = target(10)
    recovery.on_timeout(mine, RULES)
    assert holes(mine) == [(1, 1001)]
    acknowledge(mine, 1001)
    assert holes(mine) == [(1001, 3001)]
    recovery.note_sack(mine, [(3001, 9001)])
    acknowledge(mine, 2001)
    assert holes(mine) == [(9001, 10_001)]


def test_what_the_target_reported_does_not_count_as_repeated():
    mine = target(10)
    recovery.on_timeout(mine, RULES)
    mine.cwnd, mine.resend_next = 4000, 4001
    recovery.note_sack(mine, [(1001, 2001)])
    assert recovery.next_hole(mine) == (4001, 5001)  # 1 to 1001 and 2001 to 4001 were
    mine.resend_next = 1501  # half of what was repeated was reported since
    assert recovery.next_hole(mine) == (2001, 5001)


def test_no_recovery_no_holes():
    assert recovery.next_hole(target(3))[0] >= recovery.next_hole(target(3))[1]
