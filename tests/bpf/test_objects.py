"""The objects that are shipped: what their sources say, loadable here, linked as they should be."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pycopy import loader
from pycopy.errors import HostUnfit, PycopyError
from pycopy.kernel import abi, objects, syscall
from pycopy.kernel.abi import Constant
from pycopy.kernel.pcapfilter import filter_code

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(objects.CATALOGUE)

#: More than that of one million, and the next rule may not load on the oldest kernel.
VERIFIER_MOST = 500_000

#: struct bpf_insn: classes that kernels before 5.1 lack, and the one for atomic operations.
_JMP32, _STX, _ATOMIC = 0x06, 0x03, 0xC0


#: One takes a second or two, on a busy machine many.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def compiled():
    """All of them, made of the sources as they are."""
    return objects.compile_all(NAMES)


def test_what_is_shipped_is_what_the_sources_say(compiled):
    made, compiler = compiled
    said = objects.manifest(objects.objects_dir())
    assert said["sources"] == objects.source_digest(), "make them anew: pycopy bpf build"
    assert set(said["objects"]) == set(NAMES)
    files = {path.stem for path in objects.objects_dir().glob("*.bpf")}
    assert files == set(NAMES)
    if compiler != said["compiler"]:
        pytest.skip(f"made by {said['compiler']}, here is {compiler}")
    for name in NAMES:
        shipped = objects.read(objects.objects_dir(), name)
        assert shipped.programs == made[name].programs, name


def test_every_object_loads_here_whoever_compiled_it(compiled, tmp_path):
    objects.write(tmp_path, *compiled)
    for directory in (objects.objects_dir(), tmp_path):
        for name in NAMES:
            costs = objects.try_load(directory, name)
            assert set(costs) == set(objects.CATALOGUE[name].programs)
            assert all(0 < cost <= VERIFIER_MOST for cost in costs.values()), (name, costs)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_filter_and_with_perf_rings(name):
    """A function is linked in, and the other way out is live code."""
    spec = objects.CATALOGUE[name]
    code = filter_code("tcp and not port 22", spec.defines["PYCOPY_L2_BYTES"], spec.xdp)
    assert all(objects.try_load(objects.objects_dir(), name, filter_code=code, perf=True).values())


def test_only_instructions_of_old(compiled):
    """-mcpu=v2 at most, and no atomic operation: Linux 5.10 has one only, for additions."""
    for made in (compiled[0], {name: objects.read(objects.objects_dir(), name) for name in NAMES}):
        for name, each in made.items():
            for program, code in each.programs.items():
                for operation, _, _, _ in struct.iter_unpack("<BBhi", code):
                    assert operation & 7 != _JMP32, (name, program)
                    atomic = operation & 7 == _STX and operation & 0xE0 == _ATOMIC
                    assert not atomic, (name, program)


def test_nothing_of_the_host_or_the_run_is_in_them():
    """Maps are numbers, sizes are marks: the bytes are the same everywhere."""
    for name in NAMES:
        for code in objects.read(objects.objects_dir(), name).programs.values():
            for operation, registers, _, constant in struct.iter_unpack("<BBhi", code):
                if operation == 0x18 and registers >> 4 == 1:
                    assert 0 < constant <= len(abi_maps()), name
                if operation == 0x18:
                    assert registers >> 4 in (0, 1, abi.LINK_CONSTANT), name


def abi_maps():
    from pycopy.kernel import shapes

    return shapes.NUMBERS


# -- linking --------------------------------------------------------------------------------------


def instruction(operation, registers=0, offset=0, constant=0):
    return struct.pack("<BBhi", operation, registers, offset, constant)


EXIT = instruction(0x95)


def test_linking_fills_in_what_differs():
    code = (
        instruction(0x18, 1 << 4 | 1, 0, 3) + instruction(0)
        + instruction(0x18, abi.LINK_CONSTANT << 4 | 2, 0, Constant.SLOTS) + instruction(0)
        + instruction(0x85, 0, 0, abi.LINK_FILTER) + instruction(0x85, 0, 0, 5) + EXIT
    )  # fmt: skip
    plain = objects.link_code(code, {3: 77}, {Constant.SLOTS: 4096}, b"")
    assert plain == (
        instruction(0x18, 1 << 4 | 1, 0, 77) + instruction(0)
        + instruction(0x18, 2, 0, 4096) + instruction(0)
        + instruction(0xB7, 0, 0, 1) + instruction(0x85, 0, 0, 5) + EXIT
    )  # fmt: skip
    wanted = instruction(0xB7, 0, 0, 0) + EXIT
    linked = objects.link_code(code, {3: 77}, {Constant.SLOTS: 4096}, wanted)
    assert linked[: 4 * 8] == plain[: 4 * 8]
    assert linked[4 * 8 : 5 * 8] == instruction(0x85, 1 << 4, 0, 2)  # behind the exit
    assert linked[7 * 8 :] == wanted
    # Who asks for no filter gets none.
    assert objects.link_code(EXIT, {}, {}, wanted) == EXIT


# -- what can be wrong with files -----------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    directory = tmp_path / "objects"
    shutil.copytree(objects.objects_dir(), directory)
    return directory


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "gone", "no manifest", "nonsense", "other shape", "directory"]
)
def test_a_damaged_object_is_an_error_and_nothing_else(copy, damage):
    path = copy / f"{NAMES[0]}.bpf"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-8])
    elif damage == "changed":
        path.write_bytes(b"\0" + whole[1:])
    elif damage == "gone":
        path.unlink()
    elif damage == "no manifest":
        (copy / "manifest.json").unlink()
    elif damage == "nonsense":
        (copy / "manifest.json").write_bytes(b"\xff{")
    elif damage == "other shape":
        (copy / "manifest.json").write_text(json.dumps({"objects": {NAMES[0]: [1, 2]}}))
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(PycopyError) as caught:
        objects.read(copy, NAMES[0])
    assert "pycopy bpf build" in caught.value.cure


def test_an_object_with_a_right_digest_and_wrong_content_is_refused_in_words(copy):
    made = objects.read(copy, NAMES[0])
    wrong = {name: b"\xff" * len(code) for name, code in made.programs.items()}
    objects.write(copy, {NAMES[0]: objects.Object(made.license, wrong)}, {"clang": "0"})
    with pytest.raises(PycopyError) as caught:
        objects.try_load(copy, NAMES[0])
    assert "verifier rejects" in caught.value.cause


# -- without and with a compiler ------------------------------------------------------------------


LOAD = """
import sys
from pycopy import loader
loader.load("capture-tc-ether").close()
assert "bcc" not in sys.modules and not any("LLVM" in line for line in open("/proc/self/maps"))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def run_python(script, **options):
    return subprocess.run(
        [sys.executable, "-P", "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True, **options,
    ).stdout.split()  # fmt: skip


def test_no_compiler_is_needed_and_the_process_stays_small(monkeypatch):
    monkeypatch.setattr(objects, "_ask_child", None)
    loader.load("capture-tc-ether").close()
    (peak_kb,) = run_python(LOAD)
    assert int(peak_kb) < 25_000


def test_where_the_sources_have_changed_they_are_compiled(tmp_path, monkeypatch):
    changed = tmp_path / "bpf"
    shutil.copytree(objects.bpf_dir(), changed)
    with open(changed / "parse.h", "a") as file:
        file.write("/* other */\n")
    monkeypatch.setattr(objects, "bpf_dir", lambda: changed)
    made = objects.find("capture-tc-ether")
    assert set(made.programs) == {"pycopy_capture"}
    with open(changed / "parse.h", "a") as file:
        file.write("bogus\n")
    with pytest.raises(PycopyError) as caught:
        objects.find("capture-tc-ether")
    assert "parse.h" in caught.value.cause and "error" in caught.value.cause


def test_a_missing_compiler_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "_interpreter", lambda: bare_python(tmp_path))
    with pytest.raises(HostUnfit) as caught:
        objects.compile_all(["capture-tc-ether"])
    assert "python3-bpfcc" in caught.value.cure


def bare_python(directory):
    """An interpreter that has no packages: no bcc."""
    import venv

    venv.create(directory / "venv", with_pip=False)
    return str(directory / "venv" / "bin" / "python3")


def test_all_of_the_compilers_words_are_kept(tmp_path, monkeypatch):
    """What clang says behind its first line, and what kills it."""
    text = "int pycopy_capture(void *ctx)\n{ volatile char big[600] = {}; return big[1]; }\n"
    each = {"text": text, "cflags": [], "programs": ["pycopy_capture"]}
    request = {"stub": str(objects.bpf_dir() / "stub"), "objects": {"capture-tc-ether": each}}
    with pytest.raises(PycopyError) as caught:
        objects._ask_child("capture-tc-ether", request)
    assert "stack" in caught.value.cause and len(caught.value.cause.splitlines()) > 1


def test_no_header_package_is_needed(tmp_path):
    """Compile where /usr/include, /usr/src and the modules' trees are empty."""
    script = tmp_path / "bare"
    script.write_text(
        "for each in /usr/include /usr/src /lib/modules; do\n"
        '  [ ! -d "$each" ] || mount -t tmpfs none "$each" || exit 1\n'
        "done\n"
        '[ -z "$(ls -A /usr/include)" ] || exit 1\n'
        'exec "$@"\n'
    )
    build = "from pycopy.kernel import objects; objects.compile_all(['capture-xdp-ip'])"
    subprocess.run(
        ["unshare", "-m", "sh", script, sys.executable, "-P", "-c", build],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )


# -- the command ----------------------------------------------------------------------------------


def command(*words, **options):
    return subprocess.run(
        [sys.executable, "-P", "-m", "pycopy", "bpf", *words], text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip


def test_verify_compares_bytes(copy, compiled):
    if compiled[1] != objects.manifest(copy)["compiler"]:
        pytest.skip("another compiler")
    done = command("--output", str(copy), "verify", "capture-xdp-ip")
    assert done.returncode == 0 and "same" in done.stdout, done
    made = objects.read(copy, "capture-xdp-ip")
    changed = {name: code[:-8] + instruction(0x95, 1) for name, code in made.programs.items()}
    others = {name: objects.read(copy, name) for name in NAMES}
    others["capture-xdp-ip"] = objects.Object(made.license, changed)
    objects.write(copy, others, compiled[1])
    done = command("--output", str(copy), "verify", "capture-xdp-ip")
    assert done.returncode == 1 and "DIFFERS" in done.stdout
    objects.write(copy, others, {"bcc": "0.1", "clang": "3.9"})
    done = command("--output", str(copy), "verify", "capture-xdp-ip")
    assert done.returncode == 3 and "clang 3.9" in done.stderr


def test_build_load_and_list(tmp_path):
    done = command("--output", str(tmp_path / "new"), "build", "capture-xdp-ip")
    assert done.returncode == 0, done
    for action, word in (("load", "pycopy_capture"), ("list", "sha256")):
        done = command("--output", str(tmp_path / "new"), action, "capture-xdp-ip")
        assert done.returncode == 0 and word in done.stdout, done
    assert command("list").returncode == 0
    done = command("--output", str(tmp_path), "list")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert command("verify", "nonsense").returncode == 2


def test_kernels_that_lack_a_helper_are_told_which(monkeypatch):
    """What a kernel says is the verifier's; what a user reads, a sentence."""

    def refuse(*_):
        raise syscall.Rejected(22, "31: (85) call unknown#188\ninvalid func unknown#188\n")

    monkeypatch.setattr(syscall, "program_load", refuse)
    with pytest.raises(HostUnfit) as caught:
        loader.load("capture-xdp-ether")
    assert "bpf_xdp_get_buff_len" in caught.value.cause and "5.18" in caught.value.cause
