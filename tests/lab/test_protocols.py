"""Real servers online and as target: afterwards both hold the same.

Each protocol has something that HTTP/1 does not: Redis pipelines and pushes, PostgreSQL
binary messages and prepared statements, MariaDB greets first, HTTP/2 many streams at once.
"""

import re

import pytest

from pycopy.lab.content import content
from pycopy.lab.copying import Copying, Placement, wait_settled
from tests.lab.conftest import attached
from tests.lab.databases import (
    MariaDB,
    Nginx2,
    PostgreSQL,
    Redis,
    binary,
    client,
    clients,
    mariadb,
    psql,
    wait_equal,
)
from tests.lab.dial import Client

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


class RedisClient(Client):
    """Speaks RESP: several commands at once, as many answers as there are commands."""

    def send(self, *commands):
        self.sock.sendall(b"".join(
            b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)
            for words in commands
        ))  # fmt: skip

    def receive(self, number=1):
        return [self._value() for _ in range(number)]

    def ask(self, *words):
        self.send(words)
        return self._value()

    def _line(self):
        while b"\r\n" not in self._rest:
            self._more()
        line, _, self._rest = self._rest.partition(b"\r\n")
        return line

    def _value(self):
        line = self._line()
        kind, rest = line[:1], line[1:]
        assert kind != b"-", line
        if kind in b"+:":
            return rest
        if kind == b"*":
            return [self._value() for _ in range(int(rest))]
        size = int(rest)
        if size < 0:
            return None
        while len(self._rest) < size + 2:
            self._more()
        value, self._rest = self._rest[:size], self._rest[size + 2 :]
        return value


@everywhere
@pytest.mark.parametrize("family", (4, 6))
def test_redis(lab, pair, request, placement, family):
    online, target, copying = pair(Redis, 6379, placement, family)
    redis = [RedisClient(lab, family, 6379, index=index) for index in range(11)]
    listener = RedisClient(lab, family, 6379, index=11)
    listener.ask(b"SUBSCRIBE", b"news")
    for round_ in range(23):
        for number, each in enumerate(redis):
            name = b"%d:%d" % (number, round_)
            assert each.ask(b"SET", b"key:" + name, b"value " * (round_ + 1)) == b"OK"
            each.ask(b"INCR", b"counter")
            each.ask(b"APPEND", b"log:%d" % number, b"%d," % round_)  # shows order and repeats
            assert each.ask(b"GET", b"key:" + name) == b"value " * (round_ + 1)
    for number, each in enumerate(redis):  # pipelines: 101 requests before the first answer
        each.send(*((b"RPUSH", b"list:%d" % number, b"%d" % value) for value in range(101)))
        assert each.receive(101)[-1] == b"101"
        done = b"done:%d" % number
        each.send((b"MULTI",), (b"INCR", b"counter"), (b"SET", done, b"1"), (b"EXEC",))
        assert len(each.receive(4)[3]) == 2
    for number, each in enumerate(redis[:3]):
        value = bytes(range(256)) * 4_001
        each.ask(b"SET", b"big:%d" % number, value)
        assert each.ask(b"GET", b"big:%d" % number) == value
        assert each.ask(b"PUBLISH", b"news", b"big %d" % number) == b"1"
        assert listener.receive()[0][2] == b"big %d" % number
    listener.send((b"UNSUBSCRIBE",), (b"SET", b"listened", b"yes"))
    listener.receive(2)
    for each in (*redis, listener):
        each.close()
    finish(lab, copying, online, target, request, f"Redis IPv{family} ({placement.value})")


# -- PostgreSQL --------------------------------------------------------------------------------


def test_postgresql(lab, pair, request):
    online, target, copying = pair(PostgreSQL, 5432, Placement.SELF)
    connect = psql(lab, 4, 5432)
    tables = "".join(
        f"create table t{number} (id int primary key, text text, data bytea);\n"
        for number in range(7)
    )
    client(lab, connect, tables)
    bench = [binary("pgbench", "postgresql-client"), "-h", lab.address("online", 4),
             "-p", "5432", "-U", "postgres", "postgres"]  # fmt: skip
    # Rows made by the server: what is wanted here is the tables.
    client(lab, [*bench[:-1], "-i", "-I", "dtGp", "-q", bench[-1]])
    # Connections are copied each at its own pace: what others build on must be there first.
    wanted, found = wait_equal(online, target)
    assert found == wanted
    jobs = []
    for number in range(7):
        lines = [f"insert into t{number} values ({row}, repeat('x{row}', {row}), null);"
                 for row in range(101)]  # fmt: skip
        lines += ["begin;", f"update t{number} set text = text || 'y';", "commit;"]
        lines += ["begin;", f"delete from t{number};", "rollback;"]
        lines += [f"copy t{number} from stdin;"]
        lines += [f"{row}\t{'z' * 101}\t\\\\x{'ab' * 101}" for row in range(1009, 2003)]
        lines += ["\\.", f"select * from t{number};"]
        jobs.append((connect, "\n".join(lines) + "\n"))
    clients(lab, jobs)
    for protocol in ("prepared", "extended"):
        client(lab, [*bench[:-1], "-n", "-M", protocol, "-c", "5", "-t", "53",
                     "--random-seed=7", bench[-1]])  # fmt: skip
    finish(lab, copying, online, target, request, "PostgreSQL, psql, COPY and pgbench")


# -- MariaDB -----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [Placement.SELF, Placement.TARGET], ids=lambda one: one.value)
def test_mariadb(lab, pair, request, placement):
    online, target, copying = pair(MariaDB, 3306, placement)
    connect = mariadb(lab, 4, 3306)
    client(lab, connect, "create database copied;\n" + "".join(
        f"create table copied.t{number} (id int primary key, data longblob);\n"
        for number in range(5)
    ))  # fmt: skip
    wanted, found = wait_equal(online, target)
    assert found == wanted
    jobs = []
    for number in range(5):
        lines = ["use copied;", f"prepare p from 'insert into t{number} values (?, ?)';"]
        for row in range(53):
            lines += [f"insert into t{number} values ({row}, repeat('x', {row * row}));"]
            lines += [f"set @a = {row + 101}, @b = 'y';", "execute p using @a, @b;"]
        lines += [f"insert into t{number} values (1009, '{'z' * 300_007}');"]
        lines += [f"select * from t{number};"]
        jobs.append((connect, "\n".join(lines) + "\n"))
    clients(lab, jobs)
    finish(lab, copying, online, target, request, f"MariaDB ({placement.value})")


# -- HTTP/2 ------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("family", (4, 6))
def test_http2(lab, pair, request, placement, family):
    """Dozens of streams in each connection, downloads and uploads."""
    online, target, copying = pair(Nginx2, 80, placement, family)
    host = lab.address("online", family)
    site = f"http://[{host}]" if family == 6 else f"http://{host}"
    h2load = binary("h2load", "nghttp2-client")
    urls = lab.state_dir / "urls"
    urls.write_text("".join(f"{site}/b/{(1, 1009)[n % 2]}?id={n}\n" for n in range(1009)))
    said = client(lab, [h2load, "-i", str(urls), "-n", "1009", "-c", "11", "-m", "13"])
    assert "1009 succeeded, 0 failed" in said
    upload = lab.state_dir / "upload"
    upload.write_bytes(content(100_003))
    jobs = []
    for number in range(3):
        urls = lab.state_dir / f"urls{number}"
        urls.write_text("".join(f"{site}/up{number}.{n}\n" for n in range(23)))
        jobs.append(([h2load, "-i", str(urls), "-n", "23", "-c", "1", "-m", "5",
                      "-d", str(upload), "-H", ":method: PUT"], ""))  # fmt: skip
    clients(lab, jobs)
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
    """Connections by their requests; in which order streams end is the server's choice.

    Without nginx' length of each: of HTTP/2 it counts what it had read when it looked.
    """
    return sorted(
        sorted(re.sub(r" \d+", "", line, count=1) for line in requests.split("\n"))
        for requests in served.connections.elements()
    )
