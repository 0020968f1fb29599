"""The traffic of tests and of ``tests/bench``: what clients say to a server, to its end.

Each function drives one pattern from the lab's client host at an online server and checks
the answers; it knows nothing of who copies, nor of what arrives anywhere else. Where later
connections build on what earlier ones made, ``there()`` is called in between: connections
are copied each at its own pace.
"""

from pycopy.lab.content import content, http_request
from tests.lab.databases import binary, client, clients, mariadb, psql
from tests.lab.dial import Client

# -- connections -------------------------------------------------------------------------------


def clients_reset(lab, rounds=11):
    """Idle, in the middle of an upload, in the middle of an answer: three resets a round."""
    for number in range(rounds):
        idle, upload, answer = (Client(lab, 4, 80, index=index) for index in range(3))
        for each in (idle, upload, answer):
            each.ask(f"before{number}", 1009)
        idle.reset()
        upload.sock.sendall(http_request(f"cut{number}", 1, 100_003)[:50_021])
        answer.sock.sendall(http_request(f"unread{number}", 10_000_019))
        answer.sock.recv(1)
        upload.reset()
        answer.reset()


def two_at_a_time(lab, pairs=23):
    """Two connections from one client port at a time, towards ports 80 and 81."""
    for number in range(pairs):
        one = Client(lab, 4, 80)
        other = Client(lab, 4, 81, source_port=one.port)
        for round_ in range(3):
            one.ask(f"one{number}.{round_}", 1009, 10_007)
            other.ask(f"other{number}.{round_}", 10_007)
        one.close()
        other.close()


def port_used_again(lab, *, reset, times=53):
    """Connection after connection from one client port; the server closes, or the client resets."""
    port = 0
    for number in range(times):
        each = Client(lab, 4, 80, source_port=port)
        port = each.port
        each.ask(f"first{number}", 1009)
        each.ask(f"second{number}", 1009, 10_007, close=not reset)
        if reset:
            each.reset()
        else:
            each.read_end()
            each.close()


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


def redis(lab, family=4):
    """Commands one by one, pipelines, transactions, pushes to a subscriber, large values."""
    speakers = [RedisClient(lab, family, 6379, index=index) for index in range(11)]
    listener = RedisClient(lab, family, 6379, index=11)
    listener.ask(b"SUBSCRIBE", b"news")
    for round_ in range(23):
        for number, each in enumerate(speakers):
            name = b"%d:%d" % (number, round_)
            assert each.ask(b"SET", b"key:" + name, b"value " * (round_ + 1)) == b"OK"
            each.ask(b"INCR", b"counter")
            each.ask(b"APPEND", b"log:%d" % number, b"%d," % round_)  # shows order and repeats
            assert each.ask(b"GET", b"key:" + name) == b"value " * (round_ + 1)
    for number, each in enumerate(speakers):  # pipelines: 101 requests before the first answer
        each.send(*((b"RPUSH", b"list:%d" % number, b"%d" % value) for value in range(101)))
        assert each.receive(101)[-1] == b"101"
        done = b"done:%d" % number
        each.send((b"MULTI",), (b"INCR", b"counter"), (b"SET", done, b"1"), (b"EXEC",))
        assert len(each.receive(4)[3]) == 2
    for number, each in enumerate(speakers[:3]):
        value = bytes(range(256)) * 4_001
        each.ask(b"SET", b"big:%d" % number, value)
        assert each.ask(b"GET", b"big:%d" % number) == value
        assert each.ask(b"PUBLISH", b"news", b"big %d" % number) == b"1"
        assert listener.receive()[0][2] == b"big %d" % number
    listener.send((b"UNSUBSCRIBE",), (b"SET", b"listened", b"yes"))
    listener.receive(2)
    for each in (*speakers, listener):
        each.close()


# -- databases ---------------------------------------------------------------------------------


def postgresql(lab, there):
    """psql with COPY and transactions, pgbench with prepared and with unnamed statements."""
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
    there()
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


def mysql(lab, there):
    """Prepared statements and rows up to 300 KB, over connections at once."""
    connect = mariadb(lab, 4, 3306)
    client(lab, connect, "create database copied;\n" + "".join(
        f"create table copied.t{number} (id int primary key, data longblob);\n"
        for number in range(5)
    ))  # fmt: skip
    there()
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


# -- HTTP/2 ------------------------------------------------------------------------------------


def http2(lab, family=4):
    """Dozens of streams in each connection: 1009 downloads, 69 uploads."""
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
