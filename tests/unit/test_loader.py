"""What is generated for the programs, and what is looked for before anything is compiled."""

import os
import subprocess
import sys
from pathlib import Path

from pycopy import loader
from pycopy.prelude import services_prelude, targets_prelude

ROOT = Path(__file__).resolve().parents[2]
V4 = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 1])
V6 = bytes.fromhex("20010db8000000000000000000000005")


def test_services():
    assert services_prelude([(None, 80), (V4, 8080), (V6, 443)]) == (
        "#define PYCOPY_SERVICES(S) \\\n"
        "\tS(0, PYCOPY_OWN, 80, 0x00000000U, 0x00000000U, 0x00000000U, 0x00000000U) \\\n"
        "\tS(1, PYCOPY_GIVEN, 8080, 0x00000000U, 0x00000000U, 0x0000ffffU, 0x0a000001U) \\\n"
        "\tS(2, PYCOPY_GIVEN, 443, 0x20010db8U, 0x00000000U, 0x00000000U, 0x00000005U)\n"
    )
    assert "S(0, PYCOPY_ANYBODYS, 80," in services_prelude([(None, 80)], forwarded=True)


def test_targets():
    assert targets_prelude([(V4, 8080)], 40000, 49999) == (
        "#define PYCOPY_SELF 1\n"
        "#define PYCOPY_PORT_LO 40000\n"
        "#define PYCOPY_PORT_HI 49999\n"
        "#define PYCOPY_TARGETS(S) \\\n"
        "\tS(8080, 0x00000000U, 0x00000000U, 0x0000ffffU, 0x0a000001U)\n"
    )


def test_sources_are_found():
    directory = loader.bpf_dir()
    assert (directory / "capture.c").is_file()
    assert (directory / "stub" / "include" / "linux" / "kconfig.h").is_file()


def test_stub_tree_is_self_contained():
    """No link that leads out of it, no header it does not have itself."""
    stub = loader.bpf_dir() / "stub"
    for path in stub.rglob("*"):
        assert not path.is_symlink(), path
        if path.suffix == ".h":
            assert "#include" not in path.read_text("ascii"), path


def test_the_long_lived_process_imports_neither_bcc_nor_pyroute2():
    script = (
        "import sys, pycopy.loader, pycopy.pcapfilter, pycopy.prelude, pycopy.ring\n"
        "assert not {'bcc', 'pyroute2', 'scapy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


def test_without_privileges_nothing_is_compiled(root):
    script = (
        "import os\n"
        "from pycopy import loader, errors\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    loader.load('capture.c', defines={'PYCOPY_HOOK_XDP': 0})\n"
        "except errors.HostUnfit as error:\n"
        "    print(error)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", script], env=environment(), text=True)
    assert "CAP_BPF" in said


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
