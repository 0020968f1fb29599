"""The kernel matrix without a kernel: choice of packages, order of modules, archive, tables."""

import lzma

import pytest

from pycopy.errors import HostUnfit, UsageError
from tests.kernels import initramfs, packages, report

NAMES = [
    "linux-image-6.1.0-9-amd64",
    "linux-image-6.1.0-56-amd64",
    "linux-image-6.1.0-56-cloud-amd64",
    "linux-image-6.1.0-57-rt-amd64",
    "linux-image-6.1.0-57-amd64-dbg",
    "linux-image-6.1.0-57-amd64-unsigned",
    "linux-image-6.12-amd64",
    "linux-image-6.12.90+deb13.1-amd64",
    "linux-image-6.12.118+deb13-amd64",
    "linux-image-6.12.118+deb13-cloud-amd64",
    "linux-image-7.2.13+deb14-amd64",
    "linux-image-7.3.4+deb13-amd64",
    "linux-image-amd64",
]


@pytest.mark.parametrize(
    "name, package",
    [
        ("6.1", "linux-image-6.1.0-56-amd64"),
        ("6.12", "linux-image-6.12.118+deb13-amd64"),
        ("7.x", "linux-image-7.3.4+deb13-amd64"),
        ("7.2", "linux-image-7.2.13+deb14-amd64"),
        ("6.16", None),
    ],
)
def test_the_newest_plain_kernel_of_a_series_is_chosen(name, package):
    assert packages.choose(name, NAMES) == package


def test_the_mirror_is_the_one_of_the_machines_own_suite():
    targets = "http://else/where nodistro\nhttp://a/debian bookworm\nhttp://a/debian trixie\n"
    assert packages.mirrors_in(targets, "bookworm") == ("http://a/debian", "http://a/debian")
    targets += "http://a/security bookworm-security\n"
    assert packages.mirrors_in(targets, "bookworm") == ("http://a/debian", "http://a/security")
    with pytest.raises(HostUnfit, match="mirror"):
        packages.mirrors_in(targets, "noble")


@pytest.mark.parametrize("name", ["six", "6", "6.1.0", "/no/image:/no/modules"])
def test_what_names_no_kernel_is_refused(name):
    with pytest.raises(UsageError):
        packages.kernel(name)


DEPENDENCIES = """\
kernel/fs/9p/9p.ko.xz: kernel/fs/netfs/netfs.ko.xz kernel/net/9p/9pnet.ko.xz
kernel/fs/netfs/netfs.ko.xz: kernel/net/9p/9pnet.ko.xz
kernel/net/9p/9pnet.ko.xz:
kernel/drivers/virtio/virtio_pci.ko.xz:
kernel/net/9p/9pnet-virtio.ko.xz: kernel/net/9p/9pnet.ko.xz
"""


def test_a_module_is_loaded_after_all_that_it_needs():
    order = initramfs.load_order(DEPENDENCIES, ("9p", "9pnet_virtio", "overlay"))
    assert [path.rpartition("/")[2] for path in order] == [
        "9pnet.ko.xz", "netfs.ko.xz", "9p.ko.xz", "9pnet-virtio.ko.xz",
    ]  # fmt: skip


def test_modules_are_decompressed(tmp_path):
    for name, data in (("a.ko", b"module"), ("a.ko.xz", lzma.compress(b"module"))):
        path = tmp_path / name
        path.write_bytes(data)
        assert initramfs.plain(path) == b"module"


def test_the_archive_is_aligned_and_ends():
    archive = initramfs.Archive()
    archive.add("init", 0o100755, b"12345")
    data = archive.end()
    assert len(data) % 4 == 0
    assert data.startswith(b"070701") and b"TRAILER!!!\0" in data
    name = data.index(b"init\0")
    assert name == 110 and data[116:121] == b"12345"


def row(kind, kernel="6.1", good=True, problem="", **more):
    return {
        "kind": kind,
        "kernel": kernel,
        "good": good,
        "problem": problem,
        "seconds": 1.0,
        **more,
    }


ROWS = [
    row("object", compiler="clang 14", object="self-tc", instructions=21884),
    row("object", "6.12", False, "R3 min value", compiler="clang 14", object="self-tc"),
    row("copy", placement="self", family=4, requests=503, lost=0, kernel_percent=99.61),
    row("end"),
]


def test_a_refused_object_and_a_kernel_that_did_not_end_are_not_green():
    found = report.problems(ROWS, ["6.1", "6.12", "7.x"])
    assert [(kernel, problem) for kernel, _, problem in found] == [
        ("6.12", "R3 min value"),
        ("7.x", "it did not come to its end"),
    ]
    assert report.problems([each for each in ROWS if each["kernel"] == "6.1"], ["6.1"]) == []


def test_the_tables_show_every_row():
    text = report.text(ROWS, ["6.1", "6.12"])
    assert "21,884" in text and "REFUSED" in text and "99.6 %" in text and "1 not green" in text
    page = report.markdown(ROWS, ["6.1", "6.12"], ["* Date: today"])
    assert "| clang 14 | self-tc | 21,884 | REFUSED |" in page
    assert "* 6.12: object clang 14 self-tc REFUSED: R3 min value" in page
