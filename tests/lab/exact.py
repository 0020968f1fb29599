"""A server that accounts for every byte it was sent; run as a program on a lab host.

nginx shows that a real server takes the copies for real clients; this one shows what
exactly reached it. It logs a line of JSON per request (text, body bytes, SHA-256 of the
body) and one per connection (SHA-256 of all that came), so that two servers' logs can be
compared. Speaks HTTP/1.1 and a line protocol in which the server speaks first::

    < 220 0 lab            > GET 5 id1        < 250 5   (and five bytes)
    > PUT 3 id2 (and three bytes)             < 250 0
    > QUIT                                    < 221 0
"""

import argparse
import asyncio
import hashlib
import json
import re
import signal
import sys

from pycopy.lab.content import content
from pycopy.lab.servers import Served, Server

_LIMIT_BYTES = 256 * 1024
_GREETING = b"220 0 lab\r\n"


class Exact(Server):
    """The byte-exact server on a host of the lab."""

    def __init__(self, lab, role, port, protocol="http", delay_s=0):
        super().__init__(lab, role, port)
        self.command = [sys.executable, "-P", __file__, "--port", str(port)]
        self.command += ["--protocol", protocol, "--log", str(self.dir / "access.log")]
        self.command += ["--delay", str(delay_s)]

    def _prepare(self):
        (self.dir / "access.log").touch()

    def served(self):
        served = Served()
        for line in (self.dir / "access.log").read_text().splitlines():
            entry = json.loads(line)
            if "request" in entry:
                served.requests[f"{entry['request']} {entry['bytes']} {entry['sha256']}"] += 1
            else:
                served.connections[entry["connection"]] += 1
        return served

    def count(self):
        return len(re.findall(rb'^\{"request"', (self.dir / "access.log").read_bytes(), re.M))


class _Connection:
    """One accepted connection: reads requests one by one and writes the log."""

    def __init__(self, reader, writer, log, delay_s):
        self._reader = reader
        self._writer = writer
        self._log = log
        self._delay_s = delay_s
        self._stream = hashlib.sha256()
        self._stream_bytes = 0
        self._requests = 0

    async def serve(self, protocol):
        end = "closed"
        try:
            await (self._serve_line() if protocol == "line" else self._serve_http())
        except asyncio.IncompleteReadError as error:
            self._took(error.partial)
            if error.partial or error.expected:
                end = "cut short"
        except (ConnectionError, TimeoutError):
            end = "reset"
        except (ValueError, IndexError, asyncio.LimitOverrunError):
            end = "not understood"
        finally:
            self._log(
                {
                    "connection": self._stream.hexdigest(),
                    "bytes": self._stream_bytes,
                    "requests": self._requests,
                    "end": end,
                }
            )
            self._writer.close()

    def _took(self, data):
        self._stream.update(data)
        self._stream_bytes += len(data)
        return data

    async def _head(self, separator):
        return self._took(await self._reader.readuntil(separator)).decode("latin-1")

    async def _body(self, request, size_bytes):
        digest = hashlib.sha256()
        left = size_bytes
        while left:
            data = await self._reader.read(min(left, _LIMIT_BYTES))
            if not data:
                raise asyncio.IncompleteReadError(b"", left)
            digest.update(self._took(data))
            left -= len(data)
        self._requests += 1
        self._log({"request": request, "bytes": size_bytes, "sha256": digest.hexdigest()[:16]})

    async def _answer(self, data):
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        self._writer.write(data)
        await self._writer.drain()

    async def _serve_http(self):
        while True:
            head = await self._head(b"\r\n\r\n")
            line, *headers = head.rstrip("\r\n").split("\r\n")
            values = {
                name.strip().lower(): value.strip()
                for name, _, value in (header.partition(":") for header in headers)
            }
            await self._body(line, int(values.get("content-length", "0")))
            size_bytes = int(line.split(" ")[1].partition("?")[0].rpartition("/")[2])
            close = values.get("connection", "").lower() == "close"
            answer = f"HTTP/1.1 200 OK\r\nContent-Length: {size_bytes}\r\n" + (
                "Connection: close\r\n\r\n" if close else "\r\n"
            )
            await self._answer(answer.encode() + content(size_bytes))
            if close:
                return

    async def _serve_line(self):
        await self._answer(_GREETING)
        while True:
            line = (await self._head(b"\r\n")).rstrip("\r\n")
            verb, *words = line.split(" ")
            if verb == "PUT":
                await self._body(line, int(words[0]))
                await self._answer(b"250 0\r\n")
            elif verb == "GET":
                await self._body(line, 0)
                await self._answer(b"250 " + words[0].encode() + b"\r\n" + content(int(words[0])))
            elif verb == "QUIT":
                await self._body(line, 0)
                await self._answer(b"221 0\r\n")
                return
            else:
                raise ValueError(verb)


async def _serve(options, log):
    def write(entry):
        log.write(json.dumps(entry) + "\n")

    async def accepted(reader, writer):
        await _Connection(reader, writer, write, options.delay).serve(options.protocol)

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await asyncio.start_server(
        accepted, host=None, port=options.port, limit=_LIMIT_BYTES, backlog=4096
    )
    print("ready", file=sys.stderr, flush=True)
    await stop.wait()
    server.close()


def main():
    parser = argparse.ArgumentParser(description="the byte-exact server of the lab tests")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--protocol", choices=("http", "line"), default="http")
    parser.add_argument("--log", required=True)
    parser.add_argument("--delay", type=float, default=0, help="seconds before each answer")
    options = parser.parse_args()
    with open(options.log, "a", encoding="ascii", buffering=1) as log:
        asyncio.run(_serve(options, log))
    return 0


if __name__ == "__main__":
    sys.exit(main())
