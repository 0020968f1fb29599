"""A server that accounts for every byte it was sent; ``python -m pycopy.lab.exact``.

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
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from .content import content

_LIMIT_BYTES = 256 * 1024
_GREETING = b"220 0 lab\r\n"


class _Connection:
    """One accepted connection: reads requests one by one and writes the log."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: Callable[[dict[str, object]], None],
        delay_s: float,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._log = log
        self._delay_s = delay_s
        self._stream = hashlib.sha256()
        self._stream_bytes = 0
        self._requests = 0

    async def serve(self, protocol: str) -> None:
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

    def _took(self, data: bytes) -> bytes:
        self._stream.update(data)
        self._stream_bytes += len(data)
        return data

    async def _head(self, separator: bytes) -> str:
        return self._took(await self._reader.readuntil(separator)).decode("latin-1")

    async def _body(self, request: str, size_bytes: int) -> None:
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

    async def _answer(self, data: bytes) -> None:
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        self._writer.write(data)
        await self._writer.drain()

    async def _serve_http(self) -> None:
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

    async def _serve_line(self) -> None:
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


async def _serve(options: argparse.Namespace, log: TextIO) -> None:
    def write(entry: dict[str, object]) -> None:
        log.write(json.dumps(entry) + "\n")

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pycopy.lab.exact")
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
