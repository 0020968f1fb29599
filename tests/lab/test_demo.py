"""``pycopy demo`` as a user runs it, cut short; and what is left when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pycopy.lab import demo
from pycopy.lab.topology import Lab, environment

DEMO = [sys.executable, "-m", "pycopy", "demo", "--requests", "211", "--connections", "23"]


def test_every_placement_in_one_table():
    result = subprocess.run(
        [*DEMO, "--family", "4"], capture_output=True, text=True, timeout=50, env=environment()
    )
    assert result.returncode == 0, result.stderr
    heading, *rows = result.stdout.splitlines()
    assert heading.split() == " ".join(demo.HEADINGS).split()
    cells = [row.split() for row in rows]
    assert [[*row[:5], row[7]] for row in cells] == [
        [placement, "IPv4", "211", "211", "0", "yes"]
        for placement in ("self", "target", "assistant")
    ]
    assert all(float(row[5]) >= demo.KERNEL_PERCENT for row in cells)
    assert "0 lost" in result.stderr
    said = result.stderr.splitlines()
    # All that is needed to do the same by hand, in order.
    assert [line.split("#")[0].strip() for line in said if "# " in line] == [
        "online", "target", "online", "target", "assistant", "online",
    ]  # fmt: skip
    assert "  target# ip -4 route replace 10.91.1.0/24 via 10.91.4.10" in said
    assert not Lab(demo.NAME).exists()


def test_the_table_as_json():
    result = subprocess.run(
        [*DEMO, "--placement", "self", "--family", "6", "--json"],
        capture_output=True, text=True, timeout=50, env=environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert (row["placement"], row["family"], row["target"], row["lost"]) == ("self", 6, 211, 0)


def test_a_second_demonstration_leaves_the_first_one_alone():
    argv = [*DEMO, "--placement", "self", "--family", "4", "--json"]
    first = subprocess.Popen(
        argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        deadline = time.monotonic() + 20
        while not (Lab(demo.NAME).state_dir / "owner").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        second = subprocess.run(argv, capture_output=True, text=True, timeout=50, env=environment())
        assert (second.returncode, second.stdout) == (1, "")
        assert f"a lab named {demo.NAME} exists already" in second.stderr
        assert f"pycopy lab --name {demo.NAME} down" in second.stderr
        stdout, _ = first.communicate(timeout=50)
        assert first.returncode == 0
        assert json.loads(stdout)[0]["target"] == 211
    finally:
        if first.poll() is None:
            first.terminate()
            first.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_an_interrupted_demonstration_leaves_nothing(number):
    child = subprocess.Popen(
        [*DEMO[:-4], "--placement", "self"], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    lab = Lab(demo.NAME)
    record = lab.state_dir / "processes"
    try:
        deadline = time.monotonic() + 20
        # Two servers, replay and the load: in full flow.
        while not record.exists() or len(record.read_text().splitlines()) < 4:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        inside = [int(line.split()[0]) for line in record.read_text().splitlines()]
        child.send_signal(number)
        assert child.wait(timeout=20) != 0
        assert not lab.exists()
        for pid in inside:
            assert not os.path.exists(f"/proc/{pid}")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
            lab.down()
