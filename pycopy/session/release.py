"""The release rule: when the client's next segment may leave for the target.

A client segment carries in its ACK how many response bytes the client had when it sent
it. It is released

1. when the target has delivered as many, both counted from the server's own ISN; or
2. when the target's stream is over (its FIN is here): no more will come; or
3. when the target's response is shorter: everything sent is acknowledged, the target has
   answered the request before, and has been quiet for a while. The difference is then
   forgiven for good (``need_base``), so that the next response is compared on its own. A
   target that was asked nothing yet and says nothing, where online there was a greeting,
   is given longer (``Rules.greeting_ns``), since it may only be slow; or
4. at once, with -W.

A target whose responses are all *longer* is soon so far ahead of the count that rule 1 says
nothing any more. So the next request also waits until the target has begun to answer the
one before. What arrives while the target has not even acknowledged that one belongs to
earlier responses. Not all clients wait for responses: a pipeline or parallel streams must not
be brought into step. A client whose requests follow each other faster than its round trip
is such a one, and so is every client of whom a second of waiting (``quiet_max_ns``) shows
that nothing was owed, as after an HTTP/2 window update.

A close without data (FIN, RST) is in no hurry, and one that comes early cuts off what the
target still has to say. Where the target has said *more* than the client had received, the
count no longer tells its last response from those before; then a close waits for quiet, too.
(HTTP/2 servers send more or fewer frames of their own from one run to the next.) And a target
that owes a segment or more may not be brief but pause, in want of CPU or with a lost segment to
repeat. A request may leave in that pause, but a close waits for the longest silence
(``quiet_max_ns``), and so does every close where a request has left: what was forgiven may
still come, and then the count ends before the response does.

Rule 1 needs no notion of a request, so greetings, pipelining and streams need no special
case; and where both servers answer alike it holds in the very turn in which the response
is complete. (The original waits 1.5 to 2 round trips after the last response segment.)
"""

from pycopy.session.rules import QUIET_ROUND_TRIPS, Rules
from pycopy.session.stream import HORIZON_BYTES
from pycopy.session.views import NEVER, NO_POSITION, Chunk, Online, Target
from pycopy.wire.seq import MASK


def owed_bytes(target: Target, chunk: Chunk) -> int:
    """How many bytes the target still owes before ``chunk`` may leave by rule 1; negative: it
    has said more than the client had received online."""
    return chunk.need - target.need_base - (target.rcv_nxt - 1)


def may_release(target: Target, chunk: Chunk) -> bool:
    """Rules 1 and 2."""
    return owed_bytes(target, chunk) <= 0 or target_is_over(target)


def target_is_over(target: Target) -> bool:
    """True once the target's FIN has arrived and nothing before it is missing."""
    return target.fin_pos != NO_POSITION and target.rcv_nxt > target.fin_pos


def quiet_deadline_ns(target: Target, rules: Rules, since_ns: int) -> int:
    """Rule 3: when a silence that began ``since_ns`` has lasted long enough, or NEVER."""
    if target.snd_una != target.snd_nxt or target.rcv_nxt <= target.answered or target.early:
        return NEVER  # not all received, not answered, or the response has a hole
    if target.rcv_nxt == 1 and not target.answered:
        return since_ns + rules.greeting_ns
    wait_ns = QUIET_ROUND_TRIPS * target.srtt_ns
    return since_ns + min(max(wait_ns, rules.quiet_ns), rules.quiet_max_ns)


def forgive(target: Target, chunk: Chunk) -> None:
    """Rule 3, applied: from here on the shorter response counts as the whole one."""
    target.doubtful = in_doubt(target, chunk)
    target.need_base += owed_bytes(target, chunk)


def in_doubt(target: Target, chunk: Chunk) -> bool:
    """True where the response before ``chunk`` is shorter, or was on this connection, by more
    than other words in its head would make it: it may go on."""
    if target_is_over(target):
        return False
    return target.doubtful or owed_bytes(target, chunk) >= target.smss


def doubt_deadline_ns(chunk: Chunk, rules: Rules, since_ns: int) -> int:
    """Until when a close in doubt waits at least, beyond what it has to wait for anyway.

    A target that says a little now and then must not hold it for ever.
    """
    return min(since_ns + rules.quiet_max_ns, chunk.time_ns + rules.doubt_max_ns)


def asks_ahead(target: Target, chunk: Chunk) -> bool:
    """True for a request that the count lets go, though the one before is not answered yet."""
    if target.rcv_nxt > target.said_before or target_is_over(target):
        return False
    # Exactly as much as before that one: nothing was owed for it online either.
    ahead = chunk.need - target.need_base < target.said_before - 1
    return ahead and chunk.boundary and bool(chunk.data)


def closes_ahead(target: Target, chunk: Chunk) -> bool:
    """True for a close that the count lets go, though the target may not have said all."""
    if chunk.data or target_is_over(target):
        return False
    return target.doubtful or owed_bytes(target, chunk) < 0


def close_deadline_ns(target: Target, rules: Rules, since_ns: int) -> int:
    """When such a close leaves: after a quiet while, and soon even without a response."""
    return min(quiet_deadline_ns(target, rules, since_ns), since_ns + rules.quiet_max_ns)


def count_from(online: Online, target: Target, acked: int) -> int:
    """The first ACK captured was not the first one sent, so the ISN of the online server is
    lower than it seemed, and every count of response bytes higher. Return ``acked`` anew.
    """
    shift = 1 - acked
    if shift > HORIZON_BYTES or online.irs is None:
        return acked
    online.irs = (online.irs - shift) & MASK
    online.rcv_nxt += shift
    if online.queue_need >= 0:
        online.queue_need += shift
    for chunk in (*online.queue, *online.early):
        chunk.need += shift
    if target.need_base:
        target.need_base += shift
    return 1
