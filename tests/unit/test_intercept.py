"""The intercept before it needs any privilege: it is light, and it fails clearly and early.

What it does to packets: tests/lab/test_intercept_alone.py.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pycopy.command.config import InterceptConfig
from pycopy.errors import PycopyError, UsageError
from pycopy.intercept import run

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_heavy_is_imported():
    code = (
        "import sys, pycopy.intercept\n"
        "heavy = {'bcc', 'pyroute2', 'rich', 'scapy', 'asyncio', 'ssl'} & set(sys.modules)\n"
        "print(*heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
        timeout=30,
    )  # fmt: skip
    assert done.stdout == "\n"


def test_an_unknown_device_and_a_wrong_filter():
    with pytest.raises(UsageError, match="nosuch0"):
        run(InterceptConfig(interfaces=["nosuch0"], filter="tcp"))
    with pytest.raises(UsageError, match="src prot 80"):
        run(InterceptConfig(interfaces=["lo"], filter="src prot 80", bind="127.0.0.1", port=0))


def test_a_busy_port_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(PycopyError, match=f"port {port} of 127.0.0.1 is in use") as caught:
            run(InterceptConfig(interfaces=["lo"], filter="tcp", bind="127.0.0.1", port=port))
    assert "-p" in caught.value.cure
