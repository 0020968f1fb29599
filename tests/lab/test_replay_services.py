"""More than one service, more than one online host, and a server that speaks first."""

import pytest

from pycopy.lab.copying import Placement
from tests.lab.dial import Client

everywhere = pytest.mark.parametrize("placement", list(Placement), ids=lambda one: one.value)
intercepted = pytest.mark.parametrize(
    "placement", [Placement.TARGET, Placement.ASSISTANT], ids=lambda one: one.value
)
families = pytest.mark.parametrize("family", (4, 6))


@everywhere
@families
def test_the_server_speaks_first(scenario, placement, family):
    run = scenario(placement, family, servers=((25, "line"),)).start()
    run.load(503, 101, protocol="line", rate=1000, answers=(1, 1009), uploads=(0, 1, 10_007))
    run.finish()


@everywhere
def test_two_services_in_one_replay(scenario, placement):
    run = scenario(placement, 4, servers=((80, "nginx"), (25, "line"))).start()
    web = run.load(503, 101, port=80, wait=False, short=31, rate=500, id="web")
    mail = run.load(503, 101, port=25, wait=False, protocol="line", rate=500, id="mail")
    run.checked(web, 503)
    run.checked(mail, 503)
    run.finish()


@everywhere
@families
def test_two_online_hosts_into_one_target(scenario, placement, family):
    """One intercept serves two replays; the clients of both are the same addresses."""
    run = scenario(placement, family, online=("online", "online2")).start()
    first = run.load(503, 101, wait=False, short=31, rate=500, id="first")
    second = run.load(503, 101, role="online2", wait=False, short=31, rate=500, id="second")
    run.checked(first, 503)
    run.checked(second, 503)
    run.finish()


@intercepted
@families
def test_a_client_of_two_online_hosts_with_one_port(scenario, lab, placement, family):
    """At the target they would be one connection: the later one gets another port."""
    run = scenario(placement, family, online=("online", "online2")).start()
    first = Client(lab, family, 80)
    first.ask("first-1", 1009)
    assert run.settle() == 1  # now the first one's copy has the port
    second = Client(lab, family, 80, source_port=first.port, role="online2")
    for number in range(2, 6):
        second.ask(f"second-{number}", 211)
        first.ask(f"first-{number}", 1009)
    second.close()
    first.ask("first-6", 1)
    first.close()
    one, other = (replay["ledger"] for replay in run.finish().replays)
    assert (one["sessions"]["port_taken"], other["sessions"]["port_taken"]) == (0, 1)
    assert other["sessions"]["reopened"] == one["sessions"]["reopened"] == 0


def test_traffic_that_is_not_copied_stays_where_it_is(scenario):
    """Another port online is not captured, other clients of the target are answered."""
    run = scenario(Placement.SELF, 4, servers=((80, "nginx"), (81, "nginx")))
    for program in run.copying.replays:
        program.arguments[2] = program.arguments[2].partition(",")[0]
    run.start()
    run.load(101, 23, port=80, id="copied")
    run.load(101, 23, port=81, id="not")
    run.load(101, 23, role="target", port=8080, id="direct")
    run.settle(1)
    assert run.copying.stop().balanced
    copied = run.copied()
    assert copied.matching("id=copied").count == 101
    assert copied.matching("id=not").count == 0
    assert copied.matching("id=direct").count == 101
