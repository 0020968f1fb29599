"""What was compiled once is loaded again without the compiler, or not at all: never wrongly."""

import os
import shutil
import struct

import pytest

from pycopy import link, loader, objects
from pycopy.errors import PycopyError
from tests.bpf.test_loader import GOOD

#: Counts into a map made before, whose descriptor is another one each time.
SHARED = """
#include "pycopy.h"
static void *(*const look_up)(u64 map, const void *key) = (void *)1;
BPF_ARRAY(own, u32, 4);
int pycopy_shared(PYCOPY_CTX *ctx)
{
	u32 index = NUMBER;
	u64 *value = look_up(bpf_pseudo_fd(1, PYCOPY_MAP_SECOND), &index);

	if (value)
		*value += 1;
	return own.lookup(&index) ? 0 : 1;
}
"""


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The directory of this test's own objects."""
    directory = tmp_path / "kept"
    monkeypatch.setenv("CACHE_DIRECTORY", str(directory))
    return directory


@pytest.fixture
def compiled(monkeypatch):
    """The names of what is compiled from now on."""
    names, ask_child = [], loader._ask_child

    def asked(request, source, map_fds):
        names.append(source)
        return ask_child(request, source, map_fds)

    monkeypatch.setattr(loader, "_ask_child", asked)
    return names


def load(tmp_path, text=GOOD, name="good", **options):
    source = tmp_path / f"{name}.c"
    source.write_text(text)
    defines = {"PYCOPY_HOOK_XDP": 0, **options.pop("defines", {})}
    return loader.load(str(source), defines=defines, **options)


def run_once(module):
    assert link.test_run(module.program_fd, bytes(64), repeat=5).retval == 0


def shapes(module):
    return [
        link.map_info(each.fd)._replace(id=0)
        for each in sorted(module.maps.values(), key=lambda each: link.map_info(each.fd).name)
    ]


def test_the_second_time_is_the_same_without_compiler(tmp_path, kept, compiled):
    first = load(tmp_path)
    again = load(tmp_path)
    assert compiled == ["good.c"]
    assert kept.stat().st_mode & 0o777 == 0o700
    assert shapes(again) == shapes(first) and set(again.maps) == set(first.maps)
    infos = [link.program_info(each.program_fd) for each in (first, again)]
    assert infos[0].name == infos[1].name == "pycopy_good"
    assert infos[0].verified_instructions == infos[1].verified_instructions
    run_once(again)
    assert [module.maps["counts"].sum_percpu(3) for module in (first, again)] == [0, 5]
    for module in (first, again):
        module.close()


def test_xdp_is_another_program(tmp_path, compiled):
    for _ in range(2):
        load(tmp_path, defines={"PYCOPY_HOOK_XDP": 1}).close()
        load(tmp_path).close()
    assert compiled == ["good.c", "good.c"]


def test_maps_made_before_are_found_whatever_their_number(tmp_path, compiled):
    def made():
        return [
            link.map_create(link.ARRAY, name, 4, 8, entries)
            for name, entries in (("a", 1), ("b", 8))
        ]

    for turn in range(3):
        in_the_way = [os.dup(0) for _ in range(turn)]
        fds = made()
        defines = {"PYCOPY_MAP_FIRST": fds[0], "PYCOPY_MAP_SECOND": fds[1], "NUMBER": 3}
        module = load(tmp_path, SHARED, "shared", defines=defines, map_fds=fds)
        run_once(module)
        assert loader.Map(fds[1]).lookup(struct.pack("=I", 3)) == struct.pack("=Q", 5)
        module.close()
        for fd in (*fds, *in_the_way):
            os.close(fd)
    assert compiled == ["shared.c"]


def test_whatever_it_was_made_of_has_to_be_the_same(tmp_path, monkeypatch, compiled):
    load(tmp_path).close()
    load(tmp_path, GOOD + "\n").close()
    load(tmp_path, defines={"OTHER": 1}).close()
    load(tmp_path, prelude="// other\n").close()
    headers = tmp_path / "bpf"
    shutil.copytree(loader.bpf_dir(), headers)
    monkeypatch.setattr(loader, "bpf_dir", lambda: headers)
    load(tmp_path).close()  # another directory with the same files
    assert len(compiled) == 4
    with open(headers / "parse.h", "a") as file:
        file.write("/* other */\n")
    load(tmp_path).close()
    assert len(compiled) == 5


def test_another_compiler(tmp_path, monkeypatch, compiled):
    load(tmp_path).close()
    monkeypatch.setattr(objects, "_identity", lambda path: [1, 2])
    load(tmp_path).close()
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_made_anew(tmp_path, kept, compiled, damage):
    load(tmp_path).close()
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[:-1], "changed": whole.replace(b"GPL", b"MIT"), "empty": b""}[damage]
    )
    load(tmp_path).close()
    assert len(compiled) == 2 and path.read_bytes() == whole


def test_what_the_kernel_refuses_is_compiled_again(tmp_path, monkeypatch, compiled):
    """It may say why."""
    load(tmp_path).close()
    before = set(os.listdir("/proc/self/fd"))

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(link, "program_load", refuse)
    module = load(tmp_path)
    assert len(compiled) == 2
    module.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("trouble", ["others", "link", "file", "nowhere", "full"])
def test_where_nothing_can_be_kept_it_goes_without(tmp_path, kept, monkeypatch, compiled, trouble):
    if trouble == "others":
        kept.mkdir()
        kept.chmod(0o777)
    elif trouble == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        kept.symlink_to(tmp_path / "elsewhere")
    elif trouble == "file":
        kept.write_bytes(b"")
    elif trouble == "nowhere":
        monkeypatch.setenv("CACHE_DIRECTORY", "/nowhere/at/all")
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
    for _ in range(2):
        module = load(tmp_path)
        run_once(module)
        module.close()
    assert len(compiled) == 2
    if kept.is_dir():
        assert list(kept.iterdir()) == []


def test_the_oldest_go(tmp_path, kept, monkeypatch, compiled):
    monkeypatch.setattr(objects, "_KEPT", 2)
    for number in (0, 1, 0, 2):  # 1 is the one that was not used for longest
        load(tmp_path, defines={"NUMBER": number}).close()
    assert len(list(kept.iterdir())) == 2
    load(tmp_path, defines={"NUMBER": 0}).close()
    assert len(compiled) == 3
    load(tmp_path, defines={"NUMBER": 1}).close()
    assert len(compiled) == 4


def test_what_does_not_compile_is_not_kept(tmp_path, kept, compiled):
    for _ in range(2):
        with pytest.raises(PycopyError):
            load(tmp_path, "int pycopy_bad(PYCOPY_CTX *ctx) { return bogus; }", "bad")
    assert len(compiled) == 2 and not kept.exists()
