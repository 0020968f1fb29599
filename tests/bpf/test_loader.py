"""Compiling and loading for real: what a user reads when it fails, and what it costs."""

import os
import struct
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pytest

from pycopy import link, loader
from pycopy.errors import HostUnfit, PycopyError

ROOT = Path(__file__).resolve().parents[2]

GOOD = """
#include "pycopy.h"
BPF_RINGBUF_OUTPUT(ring, 16);
BPF_PERCPU_ARRAY(counts, u64, 4);
BPF_F_TABLE("lpm_trie", struct pycopy_claim_key, u32, claims, 64, 1);
int pycopy_good(PYCOPY_CTX *ctx)
{
	u32 index = 3;
	u64 *value = counts.lookup(&index);
	if (value)
		*value += 1;
	return 0;
}
"""


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path, monkeypatch):
    """Here everything is compiled; what is kept of it, test_objects.py says."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "kept"))


def loaded(tmp_path, text, name="good", **defines):
    source = tmp_path / f"{name}.c"
    source.write_text(text)
    return loader.load(str(source), defines={"PYCOPY_HOOK_XDP": 0, **defines})


def test_maps_and_counters(tmp_path):
    module = loaded(tmp_path, GOOD)
    assert set(module.maps) == {"ring", "counts", "claims"}
    assert link.program_info(module.program_fd).name == "pycopy_good"
    claims = module.maps["claims"]
    key, longer = struct.pack("=I16s", 96, bytes(16)), struct.pack("=I16s", 100, bytes(16))
    assert (claims.key_bytes, claims.value_bytes, claims.max_entries) == (20, 4, 64)
    assert claims.lookup(key) is None
    claims.update(key, struct.pack("=I", 1))
    assert claims.lookup(longer) == struct.pack("=I", 1)
    assert claims.delete(key)
    assert not claims.delete(key)
    assert link.test_run(module.program_fd, bytes(64), repeat=5).retval == 0
    counts = module.maps["counts"]
    assert len(counts.lookup(struct.pack("=I", 0))) == 8 * link.possible_cpus()
    assert [counts.sum_percpu(index) for index in range(4)] == [0, 0, 0, 5]
    with pytest.raises(IndexError):
        counts.sum_percpu(4)
    module.close()


def test_run_statistics(tmp_path):
    module = loaded(tmp_path, GOOD)
    stats = link.enable_run_stats()
    link.test_run(module.program_fd, bytes(64), repeat=100)
    assert link.program_info(module.program_fd).run_count == 100
    os.close(stats)
    module.close()


def test_closed_means_gone(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    module = loaded(tmp_path, GOOD)
    ident = link.program_info(module.program_fd).id
    module.close()
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        os.close(link.program_fd_by_id(ident))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        # clang's words, with the file and the line that the user can look up
        ("\nint pycopy_bad(PYCOPY_CTX *ctx) { return bogus; }", ["bad.c:2:", "'bogus'"]),
        ("int other(PYCOPY_CTX *ctx) { return 0; }", ["no function pycopy_bad"]),
        (
            "int pycopy_bad(PYCOPY_CTX *ctx) { return *(int *)(long)ctx->data; }",
            ["verifier rejects bad.c", "invalid access to packet"],
        ),
        # bcc 0.26's LLVM cannot do a 32-bit fetch-and-add, and says so by abort().
        (
            "BPF_ARRAY(a, u32, 1);\nint pycopy_bad(PYCOPY_CTX *ctx)\n"
            "{ u32 z = 0, *p = a.lookup(&z); return p ? __sync_fetch_and_add(p, 1) : 0; }",
            ["SIGABRT", "XADD"],
        ),
    ],
    ids=["clang", "name", "verifier", "abort"],
)
def test_what_is_wrong_is_said(tmp_path, body, words):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(PycopyError) as caught:
        loaded(tmp_path, body, name="bad")
    assert not isinstance(caught.value, HostUnfit)
    for word in words:
        assert word in caught.value.cause
    assert set(os.listdir("/proc/self/fd")) == before


def test_no_memory_for_a_map_is_the_host_s_fault(tmp_path):
    huge = (
        "struct page { char bytes[4096]; };\nBPF_ARRAY(huge, struct page, 1 << 30);\n"
        "int pycopy_bad(PYCOPY_CTX *ctx) { return 0; }"
    )
    with pytest.raises(HostUnfit) as caught:
        loaded(tmp_path, huge, name="bad")
    assert "no memory for the maps of bad.c" in caught.value.cause
    assert "--ring" in caught.value.cure


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An interpreter that has no packages: no bcc."""
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory, with_pip=False)
    return str(directory / "bin" / "python3")


def test_missing_bcc_says_what_to_install(tmp_path, bare_python, monkeypatch):
    monkeypatch.setattr(loader, "_interpreter", lambda: bare_python)
    with pytest.raises(HostUnfit) as caught:
        loaded(tmp_path, GOOD)
    assert caught.value.cure == "apt-get install python3-bpfcc"


def run_python(python, script, *arguments, **options):
    return subprocess.run(
        [python, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        **options,
    ).stdout.split()


LOAD = """
import sys
from pycopy import loader
loader.load(sys.argv[1], defines={"PYCOPY_HOOK_XDP": 0})
assert "bcc" not in sys.modules
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_bcc_is_found_in_the_distributions_python(tmp_path, bare_python):
    """pycopy in a virtual environment, bcc where apt-get has put it."""
    (tmp_path / "good.c").write_text(GOOD)
    assert run_python(bare_python, LOAD, str(tmp_path / "good.c"))


def test_the_loading_process_stays_small(tmp_path):
    (tmp_path / "good.c").write_text(GOOD)
    (peak_kb,) = run_python(sys.executable, LOAD, str(tmp_path / "good.c"))
    assert int(peak_kb) < 25_000


def test_no_header_package_is_needed(tmp_path):
    """Compile where /usr/include, /usr/src and the modules' trees are empty."""
    (tmp_path / "good.c").write_text(GOOD)
    script = tmp_path / "bare"
    script.write_text(
        "for each in /usr/include /usr/src /lib/modules; do\n"
        '  [ ! -d "$each" ] || mount -t tmpfs none "$each" || exit 1\n'
        "done\n"
        '[ -z "$(ls -A /usr/include)" ] || exit 1\n'
        'exec "$@"\n'
    )
    subprocess.run(
        ["unshare", "-m", "sh", script, sys.executable, "-c", LOAD, tmp_path / "good.c"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )


def test_three_capabilities_are_enough():
    if any(not directory.stat().st_mode & 0o1 for directory in (ROOT, *ROOT.parents)):
        pytest.skip(f"other users may not read {ROOT}")
    capabilities = "+bpf,+net_admin,+net_raw"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "good.c"
        source.write_text(GOOD)
        os.chmod(directory, 0o755)
        as_nobody = (
            "setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs "
            f"--inh-caps={capabilities} --ambient-caps={capabilities} "
            f"--bounding-set=-all,{capabilities}"
        )
        subprocess.run(
            [*as_nobody.split(), sys.executable, "-c", LOAD, source],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )
