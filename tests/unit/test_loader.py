"""What pycopy has of its BPF programs, and what is looked for before anything is loaded."""

import os
import subprocess
import sys
from pathlib import Path

from pycopy.kernel import objects

ROOT = Path(__file__).resolve().parents[2]


def test_sources_are_found():
    directory = objects.bpf_dir()
    assert (directory / "capture.c").is_file()
    assert (directory / "stub" / "include" / "linux" / "kconfig.h").is_file()


def test_stub_tree_is_self_contained():
    """No link that leads out of it, no header it does not have itself."""
    stub = objects.bpf_dir() / "stub"
    for path in stub.rglob("*"):
        assert not path.is_symlink(), path
        if path.suffix == ".h":
            assert "#include" not in path.read_text("ascii"), path


def test_the_long_lived_process_imports_neither_bcc_nor_pyroute2():
    script = (
        "import sys, pycopy.loader, pycopy.kernel.ring\n"
        "from pycopy.kernel import objects, pcapfilter\n"
        "assert not {'bcc', 'pyroute2', 'scapy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


def test_without_privileges_nothing_is_loaded(root):
    script = (
        "import os\n"
        "from pycopy import loader, errors\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    loader.load('capture-tc-ether')\n"
        "except errors.HostUnfit as error:\n"
        "    print(error)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", script], env=environment(), text=True)
    assert "CAP_BPF" in said


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
