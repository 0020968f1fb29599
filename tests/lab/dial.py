"""A client that does exactly what it is told: one socket, its port, its way to close."""

import errno
import socket
import struct
import time

from pycopy.lab.content import content, http_request

TIMEOUT_S = 20
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Client:
    """A connection from the lab's client to an online port, from ``source_port`` if given."""

    def __init__(self, lab, family, port, *, source_port=0, index=0, role="online"):
        with lab.inside("client"):
            self.sock = socket.socket({4: socket.AF_INET, 6: socket.AF_INET6}[family])
        self.sock.settimeout(TIMEOUT_S)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.sock.bind((lab.address("client", family, index), source_port))
            self._connect((lab.address(role, family), port))
        except BaseException:
            self.sock.close()
            raise
        self.port = self.sock.getsockname()[1]
        self._rest = b""

    def _connect(self, address):
        """As soon as the port is free: its last connection may wait for the ACK of its FIN."""
        until = time.monotonic() + TIMEOUT_S
        while True:
            try:
                return self.sock.connect(address)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL or time.monotonic() > until:
                    raise
            time.sleep(0.0002)

    def ask(self, name, answer_bytes=1, upload_bytes=0, *, close=False):
        """One request, and its whole answer checked."""
        self.sock.sendall(http_request(name, answer_bytes, upload_bytes, close=close))
        self.read_answer(answer_bytes)

    def read_answer(self, answer_bytes):
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        while len(self._rest) < answer_bytes:
            self._more()
        assert self._rest[:answer_bytes] == content(answer_bytes)
        self._rest = self._rest[answer_bytes:]

    def _more(self):
        data = self.sock.recv(65536)
        assert data, "the online server closed early"
        self._rest += data

    def read_end(self):
        """Wait for the server's FIN."""
        assert self._rest + self.sock.recv(1) == b""

    def shut(self):
        """Close our side only."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self):
        self.sock.close()

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.sock.close()
