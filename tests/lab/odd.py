"""Targets that do not behave as the online server does; run as a program on a lab host.

They log what :mod:`tests.lab.exact` logs, so the same comparison reads them. Sockets and
threads rather than asyncio: a server that does not read must really not read.
"""

import argparse
import hashlib
import json
import socket
import struct
import sys
import threading
import time
from pathlib import Path

from pycopy.lab.content import content
from tests.lab.exact import Exact

MODES = ("plain", "late", "closes", "resets", "greets", "half", "mute", "curt", "verbose")
LATE_S = 3.0
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
GREETING = b"greetings\r\n"


class Odd(Exact):
    """An HTTP server with one oddity, see :func:`serve`."""

    def __init__(self, lab, role, port, mode):
        super().__init__(lab, role, port)
        self.command = [sys.executable, __file__, "--port", str(port), "--mode", mode]
        self.command += ["--log", str(self.dir / "access.log")]


def serve(sock, mode, write):
    """``late``: reads nothing for 3 s. ``closes``: after every answer, unannounced.
    ``resets``: the same with a reset. ``greets``: speaks first. ``half``: closes its side after
    the first answer and reads on. ``mute``: reads and never answers. ``curt``, ``verbose``:
    answers of other sizes."""
    stream, requests, end = hashlib.sha256(), 0, "closed"
    size = 0

    def took(data):
        nonlocal size
        size += len(data)
        stream.update(data)
        return data

    reader = sock.makefile("rb")
    answers = True
    try:
        if mode == "late":
            time.sleep(LATE_S)
        if mode == "greets":
            sock.sendall(GREETING)
        while line := took(reader.readline()):
            length = 0
            while (header := took(reader.readline())) not in (b"\r\n", b""):
                name, _, value = header.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            body = hashlib.sha256()
            left = length
            while left and (data := took(reader.read1(min(left, 65536)))):
                body.update(data)
                left -= len(data)
            if left:
                end = "cut short"
                break
            requests += 1
            write({"request": line.decode().strip(), "bytes": length,
                   "sha256": body.hexdigest()[:16]})  # fmt: skip
            if not answers or mode == "mute":
                continue
            wanted = int(line.split()[1].partition(b"?")[0].rpartition(b"/")[2])
            wanted = {"curt": 1, "verbose": wanted + 10_007}.get(mode, wanted)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % wanted)
            sock.sendall(content(wanted))
            if mode == "resets":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            if mode in ("closes", "resets"):
                break
            if mode == "half":
                sock.shutdown(socket.SHUT_WR)
                answers = False
    except ConnectionError:
        end = "reset"
    finally:
        write({"connection": stream.hexdigest(), "bytes": size, "requests": requests, "end": end})
        reader.close()
        sock.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    lock = threading.Lock()
    log = options.log.open("a", buffering=1)

    def write(entry):
        with lock:
            log.write(json.dumps(entry) + "\n")

    def accept(listener):
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock, options.mode, write), daemon=True).start()

    listeners = [
        socket.create_server(("0.0.0.0", options.port), backlog=1024),
        socket.create_server(("::", options.port), family=socket.AF_INET6, backlog=1024),
    ]
    for listener in listeners[1:]:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
    accept(listeners[0])


if __name__ == "__main__":
    main()
