"""The kernel's sessions between real hosts: how much stays with them, and what leaves and returns.

As everywhere in this tier the servers' logs decide: what the target was asked is, byte for
byte and connection by connection, what the online server was asked.
"""

import json
import os
import resource
import signal
import socket
import struct
from pathlib import Path

import pytest

from pycopy.kernel import syscall
from pycopy.lab.content import http_request
from pycopy.lab.copying import Placement
from pycopy.lab.topology import DEVICE
from tests.lab import traffic
from tests.lab.impair import LEGS, impair_leg
from tests.lab.runs import settle

families = pytest.mark.parametrize("family", (4, 6))

#: Ends that a session which everybody treats well has not.
BAD_ENDS = ("target_reset", "target_refused", "target_silent", "gap", "idle", "queue_full")


@pytest.fixture
def start(scenario):
    """``start(family, more words of the command line, ...)``: a copying in zero-route mode."""

    def one(family=4, *words, **options):
        return scenario(Placement.SELF, family, replay_arguments=words, **options).start()

    return one


def sections(outcome):
    """The ledger of the one replay, of which no session ended badly."""
    (replay,) = outcome.replays
    ledger = replay["ledger"]
    assert not any(ledger["sessions"][f"ended_{end}"] for end in BAD_ENDS), ledger["sessions"]
    return ledger


# -- healthy traffic ----------------------------------------------------------------------------


@families
def test_keep_alive_stays_in_the_kernel(start, family):
    run = start(family)
    run.load(2003, 23, rate=2000, answers=(1, 1009, 10007))
    ledger = sections(run.finish())
    assert ledger["fastpath"]["kernel_percent"] >= 99, ledger["fastpath"]


@families
def test_short_connections_stay_in_the_kernel(start, family):
    run = start(family)
    run.load(1009, 1009, short=1009, rate=1000, answers=(1, 1009))
    ledger = sections(run.finish())
    assert ledger["fastpath"]["kernel_percent"] >= 95, ledger["fastpath"]
    assert ledger["sessions"]["ended_closed"] == 1009


def test_a_slower_target_is_waited_for_in_the_kernel(start):
    """50 ms for each answer: the next request waits, and leaves with the answer."""
    run = start(servers=((80, "http"),), delay_s=0.05)
    run.load(211, 23, rate=200, answers=(1, 1009))
    ledger = sections(run.finish())
    assert ledger["fastpath"]["kernel_percent"] >= 95, ledger["fastpath"]
    waited = ledger["held_us"]["under_100000"] + ledger["held_us"]["under_1000000"]
    assert waited > 0, ledger["held_us"]
    assert ledger["segments"]["held"] == 0


def test_uploads_stay_in_the_kernel(start):
    """Super-segments leave whole; what the window does not take yet is held, whatever its size."""
    run = start(servers=((80, "http"),))
    run.load(53, 11, rate=53, uploads=(3, 5003, 100_003), answers=(1, 1009))
    ledger = sections(run.finish())
    assert ledger["fastpath"]["kernel_percent"] >= 90


def test_without_it_every_segment_is_user_spaces(start):
    run = start(4, "--no-fastpath")
    run.load(211, 23, rate=1000)
    ledger = sections(run.finish())
    assert ledger["fastpath"] == {"state": "off: --no-fastpath"} and ledger["kernel"]["kept"] == 0


# -- bad networks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "legs"), [(1, LEGS), *((5, (leg,)) for leg in LEGS)],
    ids=("1 % everywhere", *(f"5 % {leg}" for leg in LEGS)),
)  # fmt: skip
def test_loss(start, lab, legs, percent):
    """Sessions leave to be repaired, and come back; nothing is lost."""
    lab.set_offloads(False)
    run = start(servers=((80, "http"),))
    impairments = [impair_leg(lab, Placement.SELF, leg, drop_ppm=percent * 10_000) for leg in legs]
    try:
        # Slow enough for sessions that were repaired to be quiet for once, and go back.
        load = run.load(1009, 23, wait=False, id="keep", answers=(1, 1009), rate=500)
        run.load(101, 101, short=101, id="short", answers=(1, 1009))
        run.checked(load, 1009)
        settle(run, 124)
    finally:
        for impairment in impairments:
            impairment.close()
        lab.set_offloads(True)
    ledger = sections(run.finish(settle=False, resets=True))
    share = ledger["fastpath"]
    assert all(impairment.final["dropped"] > 0 for impairment in impairments)
    if legs == LEGS[:1]:
        # A request of one segment that was lost is a late one to the capture, and no gap.
        assert share["kernel_percent"] >= 95, share
        return
    assert share["sessions_taken"] >= share["sessions_given"] > 0, share
    # Where requests come fast, more of them are held meanwhile than the kernel holds.
    reasons = ("timeout", "dup_ack", "response", "queue")
    assert sum(share.get(f"left_{reason}", 0) for reason in reasons) > 0, share


def test_the_way_to_the_target_is_gone_for_a_while(start, lab):
    run = start(servers=((80, "http"),))
    load = run.load(1009, 23, wait=False, answers=(1, 1009), rate=500)
    assert run.eventually(lambda: run.copied_count() > 100)
    route = [lab.prefix("target", 4), "dev", DEVICE, "scope", "link"]
    lab.run("online", ["ip", "route", "del", *route])
    try:
        asked = run.asked().count
        assert run.eventually(lambda: run.asked().count > asked + 50)
    finally:
        lab.run("online", ["ip", "route", "add", *route])
    run.checked(load, 1009)
    settle(run, 23)
    ledger = sections(run.finish(settle=False))
    assert ledger["fastpath"]["left_hop"] > 0
    assert ledger["fastpath"]["sessions_given"] > 0
    assert ledger["sending"]["error_NO_NEXT_HOP"] > 0


# -- choices of the user ------------------------------------------------------------------------


def test_no_waiting_for_answers(start):
    """-W: nothing is held, however slow the target is."""
    run = start(4, "-W", servers=((80, "http"),), delay_s=0.02)
    run.load(211, 23, rate=500, answers=(1, 1009))
    ledger = sections(run.finish())
    assert ledger["fastpath"]["kernel_percent"] >= 95, ledger["fastpath"]
    assert ledger["held_us"]["under_1000000"] == 0


def test_only_connections_seen_from_their_syn(start):
    run = start(4, "-O")
    run.load(503, 101, short=53, rate=1000)
    ledger = sections(run.finish())
    assert ledger["fastpath"]["kernel_percent"] >= 95, ledger["fastpath"]
    assert ledger["sessions"]["mid_stream"] == 0


def test_half_of_the_clients(start):
    """-r 50: who is copied is decided by user space; what is copied is copied whole."""
    run = start(4, "-r", "50", servers=((80, "http"),))
    run.load(503, 101, rate=1000, answers=(1, 1009))
    run.eventually(lambda: run.copied().connections.total() >= 20, 2)
    outcome = run.copying.stop()
    ledger = sections(outcome)
    assert outcome.balanced and run.attached() == []
    assert 20 < ledger["sessions"]["opened"] < 80 and ledger["segments"]["sampled_out"] > 0
    assert not run.asked().surplus(run.copied())
    assert ledger["fastpath"]["sessions_given"] > 0


def test_no_more_sessions_than_allowed(start):
    run = start(4, "--max-sessions", "11", servers=((80, "http"),))
    run.load(211, 53, rate=500, answers=(1,), concurrency=53)
    outcome = run.copying.stop()
    ledger = sections(outcome)
    assert outcome.balanced and run.attached() == []
    assert ledger["segments"]["refused_session_limit"] > 0
    assert not run.asked().surplus(run.copied())
    assert 11 <= run.copied().connections.total() <= ledger["sessions"]["opened"]


@pytest.mark.parametrize("reset", (False, True), ids=("server closes", "client resets"))
def test_a_client_port_used_again_at_once(start, lab, reset):
    run = start(servers=((80, "http"),))
    traffic.port_used_again(lab, reset=reset, times=23)
    settle(run)
    outcome = run.copying.stop()
    # A server in TIME_WAIT may answer a SYN for the connection before: the client resets that,
    # and the copy of it is a connection without a request.
    assert run.asked().requests == run.copied().requests
    assert sections(outcome)["sessions"]["opened"] >= 23
    assert outcome.balanced and run.attached() == []


# -- the process --------------------------------------------------------------------------------


def test_the_ledger_while_it_runs(start):
    run = start(4)
    load = run.load(1009, 23, wait=False, rate=1000)
    assert run.eventually(lambda: run.copied_count() > 101)
    (replay,) = run.copying.replays
    replay.process.send_signal(signal.SIGUSR1)
    assert run.eventually(lambda: '"summary"' in replay.output)
    shown = json.loads(replay.output.splitlines()[-1])["ledger"]
    assert shown["fastpath"]["kernel_segments"] > 100
    assert 1 <= shown["sessions"]["active"] <= 23
    # In a hurry: signals come while the kernel's timer runs, again and again.
    while load.running:
        replay.process.send_signal(signal.SIGUSR1)
        assert replay.process.poll() is None, replay.messages
    run.checked(load, 1009)
    run.finish()


def test_kill_9_leaves_nothing(start):
    run = start(4)
    load = run.load(701, 101, wait=False, rate=700)
    assert run.eventually(lambda: run.copied_count() > 101)
    (replay,) = run.copying.replays
    mine = maps_of(replay.pid)
    assert len(mine) > 14 and mine <= all_maps()
    replay.kill()
    run.checked(load, 701)
    assert run.eventually(lambda: not mine & all_maps()), mine & all_maps()
    assert run.attached() == []


def maps_of(pid):
    """Ids of the BPF maps that a process has."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        for line in Path(f"/proc/{pid}/fdinfo/{name}").read_text().splitlines():
            if line.startswith("map_id:"):
                found.add(int(line.split()[1]))
    return found


def all_maps():
    """Ids of all BPF maps that there are (BPF_MAP_GET_NEXT_ID)."""
    layout, found, ident = struct.Struct("=III"), set(), 0
    while True:
        attribute = syscall._attr(layout, ident, 0, 0)
        try:
            syscall.bpf(12, attribute)
        except FileNotFoundError:
            return found
        ident = layout.unpack(attribute.raw)[1]
        found.add(ident)


def test_thousands_of_idle_sessions_end_with_the_run(start, lab):
    """Ctrl-C takes them all back and resets them: the target is left with none."""
    number, before = 2000, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2 * number, before[0]), before[1]))
    sockets = []
    try:
        run = start(servers=((80, "http"),))
        with lab.inside("client"):
            for index in range(number):
                sock = socket.socket()
                sockets.append(sock)
                sock.settimeout(10)
                sock.bind((lab.address("client", 4, index % 10), 0))
                sock.connect((lab.address("online", 4), 80))
                sock.sendall(http_request(f"idle{index}", 1))
        assert run.eventually(lambda: run.copied_count() == number, 20), run.copied_count()
        assert open_at_target(lab) == number
        outcome = run.copying.stop()
        ledger = sections(outcome)
        assert outcome.balanced and run.attached() == []
        assert ledger["sessions"]["ended_run_ended"] == number
        assert ledger["fastpath"]["left_asked"] >= number * 0.9, ledger["fastpath"]
        assert run.eventually(lambda: open_at_target(lab) == 0)
        assert not run.asked().lost(run.copied())
    finally:
        for sock in sockets:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def open_at_target(lab):
    """Connections that the target's service has."""
    command = ["ss", "-Hnt", "state", "established", "sport", "=", ":8080"]
    return len(lab.run("target", command).stdout.splitlines())
