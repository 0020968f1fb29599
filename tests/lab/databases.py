"""Real servers on the lab's hosts whose contents can be compared: Redis, PostgreSQL,
MariaDB; and nginx speaking HTTP/2 in clear text. All data lives below the lab's directory
or a temporary one, nothing is synced to disk, no password is asked for.
"""

import contextlib
import hashlib
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from pycopy.errors import HostUnfit
from pycopy.lab.servers import Nginx, Server

#: Clients in scripts stop at their first error, so that a test sees it.
_PSQL = ["psql", "-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-U", "postgres"]


def binary(name, package):
    """Where the program is; its absence is named with the cure."""
    places = f"/usr/sbin:/usr/bin:{_postgresql_dir()}"
    found = shutil.which(name, path=places)
    if found is None:
        raise HostUnfit(f"{name} is not installed", f"install it: apt-get install {package}")
    return found


def _postgresql_dir():
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=str)
    return versions[-1].parent if versions else ""


class Database(Server):
    """A server with contents; :meth:`contents` is equal where every statement arrived."""

    def contents(self):
        raise NotImplementedError

    def rows(self):
        """The same as a multiset, so that it can be counted what is missing."""
        raise NotImplementedError

    def answered(self, argv, text="", timeout_s=30):
        """The output of a client on the server's own host; "" if there is none yet."""
        result = subprocess.run(
            ["ip", "netns", "exec", self.lab.namespace(self.role), *argv],
            input=text, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        return result.stdout.strip()

    def wait_ready(self, timeout_s=20):
        """Some listen before they answer."""
        deadline = time.monotonic() + timeout_s
        while not self.answers():
            assert time.monotonic() < deadline, (self.dir / "output").read_text()[-2000:]
            time.sleep(0.02)

    def answers(self):
        raise NotImplementedError

    def start(self):
        super().start()
        self.wait_ready()


class Redis(Database):
    """redis-server without persistence."""

    def __init__(self, lab, role, port):
        super().__init__(lab, role, port)
        self.command = [
            binary("redis-server", "redis-server"), "--port", str(port), "--bind", "0.0.0.0", "::",
            "--protected-mode", "no", "--save", "", "--appendonly", "no", "--dir", str(self.dir),
            "--enable-debug-command", "local", "--daemonize", "no",
        ]  # fmt: skip

    def _prepare(self):
        pass

    def _ask(self, *words):
        return self.answered(["redis-cli", "-p", str(self.port), *words])

    def answers(self):
        return self._ask("ping") == "PONG"

    def contents(self):
        """Number of keys, and Redis' own digest of keys, values and types."""
        return self._ask("dbsize"), self._ask("debug", "digest")

    def rows(self):
        keys = sorted(self._ask("keys", "*").split())
        values = self._ask("debug", "digest-value", *keys).split() if keys else []
        return Counter(zip(keys, values, strict=True))


class PostgreSQL(Database):
    """A cluster of its own, which runs as postgres, not root."""

    def __init__(self, lab, role, port):
        super().__init__(lab, role, port)
        self._binary = binary("postgres", "postgresql")
        self.data = Path(tempfile.mkdtemp(prefix="pycopy-test-postgresql-"))
        self.command = [
            *_AS_POSTGRES, self._binary, "-D", str(self.data / "cluster"), "-p", str(port),
            "-c", "listen_addresses=*", "-c", "unix_socket_directories=", "-c", "fsync=off",
            "-c", "shared_buffers=16MB", "-c", "autovacuum=off",
        ]  # fmt: skip

    def _prepare(self):
        shutil.chown(self.data, "postgres", "postgres")
        subprocess.run(
            [*_AS_POSTGRES, binary("initdb", "postgresql"), "-A", "trust", "-U", "postgres", "-N",
             "-D", str(self.data / "cluster")],
            check=True, capture_output=True, cwd="/",
        )  # fmt: skip
        with (self.data / "cluster/pg_hba.conf").open("a") as access:
            access.write("host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n")

    def stop(self):
        super().stop()
        shutil.rmtree(self.data, ignore_errors=True)

    def _ask(self, statement):
        argv = [*_PSQL, "-h", "127.0.0.1", "-p", str(self.port), "-c", statement]
        return self.answered(argv)

    def answers(self):
        return self._ask("select 1") == "1"

    def contents(self):
        """Every row of every table of ours, digested; pgbench's own time stamps left out."""
        return {table: _digest(rows) for table, rows in self._tables()}

    def _tables(self, only=None):
        """Tables and their rows; ``only`` has a condition for some of them."""
        tables = self._ask("select tablename from pg_tables where schemaname = 'public'").split()
        rows = "select (to_jsonb(r) - 'mtime')::text from {} r {} order by 1"
        return [
            (table, self._ask(rows.format(table, (only or {}).get(table, ""))))
            for table in sorted(tables)
        ]

    def rows(self):
        """Without the 100,000 that the server made itself from one statement of pgbench."""
        return _rows(self._tables({"pgbench_accounts": "where abalance <> 0"}))


class MariaDB(Database):
    """mariadbd on an empty data directory: no grants, hence no password."""

    def __init__(self, lab, role, port):
        super().__init__(lab, role, port)
        self.command = [
            binary("mariadbd", "mariadb-server-core"), "--no-defaults", "--user=root",
            f"--datadir={self.dir}/data", f"--socket={self.dir}/socket", f"--port={port}",
            f"--pid-file={self.dir}/pid", "--skip-grant-tables", "--skip-networking=0",
            "--bind-address=0.0.0.0,::", "--innodb-flush-method=nosync",
            "--innodb-log-file-size=4M", "--innodb-buffer-pool-size=8M",
        ]  # fmt: skip

    def _prepare(self):
        (self.dir / "data").mkdir()

    def _ask(self, statement):
        return self.answered(
            ["mariadb", "--no-defaults", f"--socket={self.dir}/socket", "-N", "-B"], statement
        )

    def answers(self):
        return self._ask("select 1") == "1"

    def contents(self):
        return {table: _digest(rows) for table, rows in self._tables()}

    def _tables(self):
        tables = self._ask(
            "select table_name from information_schema.tables where table_schema = 'copied'"
        ).split()
        rows = "select * from copied.{} order by 1, 2"
        return [(table, self._ask(rows.format(table))) for table in sorted(tables)]

    def rows(self):
        return _rows(self._tables())


class Nginx2(Nginx):
    """nginx that takes HTTP/2 in clear text, by prior knowledge."""

    def _prepare(self):
        super()._prepare()
        conf = self.dir / "nginx.conf"
        # The form that 1.22 to 1.27 understand; later ones still accept it with a warning.
        text = conf.read_text().replace("backlog=8192;", "backlog=8192 http2;")
        conf.write_text(text.replace("default_type", "dav_methods PUT;\n    default_type"))

    def uploaded(self):
        """What was put here, by name."""
        return {
            path.name: _digest(path.read_bytes().decode("latin-1"))
            for path in (self.dir / "root").glob("up*")
        }


def streams(requests):
    """What nginx logged, without the length of each: of HTTP/2 it counts what it had read when
    it looked."""
    return [re.sub(r" \d+", "", line, count=1) for line in requests]


def _rows(tables):
    return Counter((table, _digest(row)) for table, rows in tables for row in rows.splitlines())


def _digest(text):
    return hashlib.sha256(text.encode("latin-1", "replace")).hexdigest()[:16]


_AS_POSTGRES = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]


def wait_equal(online, target, timeout_s=20):
    """Wait until the target's contents are the online server's; both, for the assertion."""
    wanted = online.contents()
    deadline = time.monotonic() + timeout_s
    while (found := target.contents()) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return wanted, found


def client(lab, argv, text="", timeout_s=40):
    """Run a database's own client on the lab's client host to its end; its output."""
    result = subprocess.run(
        ["ip", "netns", "exec", lab.namespace("client"), *argv],
        input=text, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def clients(lab, jobs, timeout_s=40):
    """Run several at once: (argv, text) each."""
    started = []
    try:
        for argv, text in jobs:
            started.append(subprocess.Popen(
                ["ip", "netns", "exec", lab.namespace("client"), *argv], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            ))  # fmt: skip
            started[-1].stdin.write(text.encode())
            started[-1].stdin.close()
            started[-1].stdin = None
        for child in started:
            said = child.communicate(timeout=timeout_s)[1]
            assert child.returncode == 0, said.decode()[-2000:]
    finally:
        for child in started:
            with contextlib.suppress(OSError):
                child.kill()
            child.wait()
            child.stderr.close()


def psql(lab, family, port):
    return [*_PSQL, "-h", lab.address("online", family), "-p", str(port)]


def mariadb(lab, family, port):
    return ["mariadb", "--no-defaults", "-h", lab.address("online", family), "-P", str(port),
            "-N", "-B"]  # fmt: skip
