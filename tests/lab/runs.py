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
        recovered_s = settle(run)
    finally:
        for impairment in impairments:
            impairment.close()
    outcome = account(run, request, name, recovered_s)
    ends = outcome.replays[0]["ledger"]["sessions"]
    assert not any(ends[f"ended_{end}"] for end in BAD_ENDS), ends
    return {
        what: sum(impairment.final[what] for impairment in impairments)
        for what in impairments[0].final
    }


def settle(run, patience_s=PATIENCE_S, *, connections=True):
    """Wait for the target to have everything; how long that took."""
    began = time.monotonic()
    wait_settled(run.copied_count, sum(server.count() for server in run.online), patience_s)
    recovered_s = time.monotonic() - began
    # A server logs a connection when it ends: by now every session has to, by itself.
    if connections:
        run.eventually(lambda: run.asked().connections == run.copied().connections, patience_s)
    return recovered_s


def account(run, request, name, recovered_s, **options):
    """Write the row, stop pycopy and hold it to its promises."""
    asked, copied = run.asked(), run.copied()
    lost = asked.lost(copied).total()
    row = name, asked.count, copied.count, lost, round(recovered_s, 2)
    request.node.user_properties.append(("row", row))
    if options.get("connections", True):
        assert asked.connections == copied.connections, "sessions that have not ended"
    return run.finish(settle=False, **options)
