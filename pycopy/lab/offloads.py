"""Switch an interface's offloads, by the ioctl that ethtool uses.

On veth the offloads decide what pycopy sees: with them on, checksums are partial and
segments up to 64 KB; with them off, every frame looks as it would on a wire. Acts in the
calling thread's network namespace.

Tests: tests/lab/test_lab.py
"""

import ctypes
import errno
import fcntl
import socket
import struct

_SIOCETHTOOL = 0x8946
_IFREQ = struct.Struct("16sP16x")

#: ETHTOOL_S*: receive checksums, transmit checksums, scatter-gather, TSO, GSO, GRO. Each one
#: presupposes those before it, so they go on in this order and off in the reverse one.
_SETTERS = (0x15, 0x17, 0x19, 0x1F, 0x24, 0x2C)


def ethtool(device: str, command: int, value: int) -> int:
    """An ethtool command with one value (ETHTOOL_G* or ETHTOOL_S*): the value after it.

    OSError, as the kernel has it: EOPNOTSUPP where the driver has no such offload.
    """
    request = ctypes.create_string_buffer(struct.pack("II", command, value), 8)
    ifreq = _IFREQ.pack(device.encode(), ctypes.addressof(request))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, ifreq)
    return int(struct.unpack("II", request.raw)[1])


def set_all(device: str, on: bool) -> None:
    """All offloads of ``device`` on or off; what the driver does not have is passed over."""
    for command in _SETTERS if on else reversed(_SETTERS):
        try:
            ethtool(device, command, int(on))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
