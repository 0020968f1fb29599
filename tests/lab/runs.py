"""One copying under bad conditions to its accounts, and the row it leaves in the report.

Rows are properties of the test (pytest --junit-xml), so that a table of requests online,
at the target, lost and time to recover can be made from any run.
"""

import time

from pycopy.lab.copying import wait_settled

#: A lost segment is repeated after 0.2 s, doubled each time; five losses running are 6 s.
PATIENCE_S = 13.0

#: Sessions that were neither answered nor closed as the client's were.
BAD_ENDS = ("target_reset", "target_refused", "target_silent", "gap", "idle", "queue_full",
            "superseded")  # fmt: skip


def run_impaired(scenario, placement, request, name, impair, *, family=4, **options):
    """Three loads at once under what ``impair()`` sets up; all must arrive, all must end."""
    run = scenario(placement, family, servers=((80, "http"),), **options).start()
    impairments = impair()
    try:
        loads = [
            (503, run.load(503, 23, wait=False, id="keep", answers=(1, 1009))),
            (211, run.load(211, 211, short=211, wait=False, id="short", answers=(1, 1009))),
            (53, run.load(53, 11, wait=False, id="up", uploads=(100_003,), answers=(1,))),
        ]
        for requests, load in loads:
            run.checked(load, requests)
        recovered_s = settle(run, 23 + 211 + 11)
    finally:
        for impairment in impairments:
            impairment.close()
    # A client whose last segments are lost may answer late ones with a reset, as any host.
    outcome = account(run, request, name, recovered_s, resets=True)
    ends = outcome.replays[0]["ledger"]["sessions"]
    assert not any(ends[f"ended_{end}"] for end in BAD_ENDS), ends
    return {
        what: sum(impairment.final[what] for impairment in impairments)
        for what in impairments[0].final
    }


def settle(run, connections=0, patience_s=PATIENCE_S):
    """Wait for the target to have everything; how long that took.

    ``connections``: so many are closed by both sides online, and have to be at the target;
    0 where the target regroups requests.
    """
    began = time.monotonic()
    if connections:  # a server logs a connection when it ends
        run.eventually(lambda: run.asked().connections.total() == connections, patience_s)
    wait_settled(run.copied_count, sum(server.count() for server in run.online), patience_s)
    if connections:
        run.eventually(lambda: run.asked().connections == run.copied().connections, patience_s)
    return time.monotonic() - began


def account(run, request, name, recovered_s, *, connections=True, resets=False):
    """Write the row, stop pycopy and hold it to its promises.

    ``connections``: requests share connections at the target as they do online.
    ``resets``: clients of this run send resets of their own.
    """
    asked, copied = run.asked(), run.copied()
    lost = asked.lost(copied).total()
    row = name, asked.count, copied.count, lost, round(recovered_s, 2)
    request.node.user_properties.append(("row", row))
    if connections and asked.connections == copied.connections:
        return run.finish(settle=False, resets=resets)
    outcome = run.copying.stop()
    said = "\n".join(program.messages for program in run.copying.programs)
    summary = f"{outcome}\n{said}"
    assert not asked.lost(copied), f"lost {lost}\n{summary}"
    assert not asked.surplus(copied), f"unasked {asked.surplus(copied).total()}\n{summary}"
    assert not connections, f"sessions have not ended, or not alike\n{summary}"
    assert outcome.balanced, summary
    assert run.attached() == []
    return outcome
