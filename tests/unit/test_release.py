from pycopy.session.release import forgive, may_release, quiet_deadline_ns, target_is_over
from pycopy.session.rules import MS, Rules
from pycopy.session.views import NEVER, Chunk, Target

RULES = Rules()


def target(received):
    made = Target(0, 1, 1460, 0)
    made.snd_una = made.snd_nxt = 101
    made.rcv_nxt = 1 + received
    return made


def chunk(need):
    return Chunk(101, b"x", 0, need, 0)


def test_released_when_as_much_was_delivered():
    assert may_release(target(0), chunk(0))
    assert not may_release(target(499), chunk(500))
    assert may_release(target(500), chunk(500))
    assert may_release(target(700), chunk(500))


def test_released_when_the_target_is_over():
    mine = target(10)
    mine.fin_pos = 11
    assert not target_is_over(mine) and not may_release(mine, chunk(500))
    mine.rcv_nxt = 12
    assert target_is_over(mine) and may_release(mine, chunk(500))


def test_quiet_needs_an_answer_that_is_whole():
    mine = target(300)
    assert quiet_deadline_ns(mine, RULES, 5) == 5 + RULES.quiet_ns
    mine.early = ((400, 500),)
    assert quiet_deadline_ns(mine, RULES, 5) == NEVER
    mine.early, mine.answered = (), 301
    assert quiet_deadline_ns(mine, RULES, 5) == NEVER
    mine.answered, mine.snd_nxt = 1, 102
    assert quiet_deadline_ns(mine, RULES, 5) == NEVER


def test_quiet_lasts_some_round_trips_within_limits():
    mine = target(300)
    mine.srtt_ns = 50 * MS
    assert quiet_deadline_ns(mine, RULES, 0) == 200 * MS
    mine.srtt_ns = 5000 * MS
    assert quiet_deadline_ns(mine, RULES, 0) == RULES.quiet_max_ns


def test_forgiven_for_good():
    mine = target(300)
    forgive(mine, chunk(500))
    assert may_release(mine, chunk(500)) and not may_release(mine, chunk(501))
    mine.rcv_nxt += 400
    assert may_release(mine, chunk(900)) and not may_release(mine, chunk(901))
