"""Real servers online and as target: afterwards both hold the same.

Each protocol has something that HTTP/1 does not: Redis pipelines and pushes, PostgreSQL
binary messages and prepared statements, MariaDB greets first, HTTP/2 many streams at once.
"""

import pytest

from pycopy.lab.copying import Copying, Placement, wait_settled
from tests.lab import traffic
from tests.lab.conftest import attached
from tests.lab.databases import MariaDB, Nginx2, PostgreSQL, Redis, streams, wait_equal

everywhere = pytest.mark.parametrize("placement", list(Placement), ids=lambda one: one.value)


@pytest.fixture
def pair(lab):
    """``pair(kind, port, placement, family)``: online, target, a started copying."""
    made = []

    def make(kind, port, placement, family=4, **options):
        online, target = kind(lab, "online", port), kind(lab, "target", port + 8000)
        copying = Copying(lab, placement, family, ports=[(port, port + 8000)], **options)
        made.extend((online, target, copying))
        online.start()
        target.start()
        copying.start()
        return online, target, copying

    yield make
    for each in reversed(made):
        each.abandon() if isinstance(each, Copying) else each.stop()


def same(online, target):
    wanted, found = wait_equal(online, target)
    assert found == wanted


def finish(lab, copying, online, target, request, name):
    """The same is in both, every segment is accounted for, nothing stays attached."""
    wanted, found = wait_equal(online, target)
    outcome = copying.stop()
    summary = f"{outcome}\n" + "\n".join(program.messages for program in copying.programs)
    row = name, "all contents", "the same" if found == wanted else "other", "-", "-"
    request.node.user_properties.append(("row", row))
    assert found == wanted, summary
    assert outcome.balanced, summary
    assert attached(lab) == []
    return outcome


# -- Redis -------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("family", (4, 6))
def test_redis(lab, pair, request, placement, family):
    online, target, copying = pair(Redis, 6379, placement, family)
    traffic.redis(lab, family)
    finish(lab, copying, online, target, request, f"Redis IPv{family} ({placement.value})")


# -- PostgreSQL --------------------------------------------------------------------------------


def test_postgresql(lab, pair, request):
    online, target, copying = pair(PostgreSQL, 5432, Placement.SELF)
    traffic.postgresql(lab, lambda: same(online, target))
    finish(lab, copying, online, target, request, "PostgreSQL, psql, COPY and pgbench")


# -- MariaDB -----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [Placement.SELF, Placement.TARGET], ids=lambda one: one.value)
def test_mariadb(lab, pair, request, placement):
    online, target, copying = pair(MariaDB, 3306, placement)
    traffic.mysql(lab, lambda: same(online, target))
    finish(lab, copying, online, target, request, f"MariaDB ({placement.value})")


# -- HTTP/2 ------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("family", (4, 6))
def test_http2(lab, pair, request, placement, family):
    """Dozens of streams in each connection, downloads and uploads."""
    online, target, copying = pair(Nginx2, 80, placement, family)
    traffic.http2(lab, family)
    wait_settled(target.count, online.count())
    outcome = copying.stop()
    asked, copied = online.served(), target.served()
    row = f"HTTP/2 IPv{family} ({placement.value})", asked.count, copied.count
    request.node.user_properties.append(("row", (*row, asked.lost(copied).total(), "-")))
    assert asked.count == 1009 + 3 * 23
    assert _streams(asked) == _streams(copied), (asked.lost(copied), copied.lost(asked), outcome)
    assert len(online.uploaded()) == 3 * 23
    assert online.uploaded() == target.uploaded()
    assert outcome.balanced, outcome
    assert attached(lab) == []


def _streams(served):
    """Connections by their requests; in which order streams end is the server's choice."""
    return sorted(
        sorted(streams(requests.split("\n"))) for requests in served.connections.elements()
    )
