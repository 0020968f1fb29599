"""The guest's first file system: busybox, the modules that its root needs, and an init script.

Pure but for reading files: a cpio archive as bytes. Knows what the root is made of, see
:mod:`tests.kernels.guest`, and nothing of what runs there.
"""

import gzip
import lzma
import shutil
import stat
import subprocess
from pathlib import Path

from pycopy.errors import HostUnfit, PycopyError

#: What must be there before the root is; all else is loaded from there as it is wanted.
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
BUSYBOX = Path("/bin/busybox")

#: The machine's root, read-only, below a layer in memory; the script there goes on.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules.order); do insmod /modules/$module || echo "insmod $module: $?"; done
share=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o ro,cache=loose,$share root /lower || exec poweroff -f
mount -t tmpfs -o size=75% layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work root /root ||
    exec poweroff -f
mkdir -p /root/usr/lib/modules/$(uname -r)
mount -t 9p -o ro,cache=loose,$share modules /root/usr/lib/modules/$(uname -r)
mount -t tmpfs -o mode=755 run /root/run
mkdir /root/run/exchange
cp /bin/busybox /root/run/busybox
mount -t 9p -o $share exchange /root/run/exchange
for here in proc sys dev; do mount --move /$here /root/$here; done
exec switch_root /root /bin/sh /run/exchange/init
"""


def build(modules, into):
    """Write the archive for a kernel with this directory of modules."""
    if not BUSYBOX.exists():
        raise HostUnfit("busybox is not installed", "install it: apt-get install busybox-static")
    archive = Archive()
    for name in ("bin", "proc", "sys", "dev", "lower", "layer", "root", "modules"):
        archive.add(name, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, BUSYBOX.read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, INIT.encode())
    order = load_order(Path(modules, "modules.dep").read_text(), MODULES)
    names = []
    for path in order:
        names.append(Path(path).name.partition(".")[0] + ".ko")
        data = plain(Path(modules, path))
        archive.add(f"modules/{names[-1]}", stat.S_IFREG | 0o644, data)
    archive.add("modules.order", stat.S_IFREG | 0o644, "\n".join(names).encode())
    Path(into).write_bytes(archive.end())


def load_order(dependencies, wanted):
    """Paths of the wanted modules and all they need, each after what it needs.

    ``dependencies`` is the text of modules.dep; a module that is not in there is built in.
    """
    needs, paths = {}, {}
    for line in dependencies.splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
        paths[_module_name(path)] = path
    order = []

    def add(path):
        if path not in order:
            # modules.dep lists everything a module needs, the innermost last.
            for other in reversed(needs[path]):
                add(other)
            order.append(path)

    for name in wanted:
        if name in paths:
            add(paths[name])
    return order


def _module_name(path):
    return Path(path).name.partition(".")[0].replace("-", "_")


def plain(path):
    """A module's bytes, decompressed as its name says."""
    data = path.read_bytes()
    match path.suffix:
        case ".ko":
            return data
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
        case ".zst" if shutil.which("zstd"):
            command = ["zstd", "-dc"]
            return subprocess.run(command, input=data, capture_output=True, check=True).stdout
    raise PycopyError(f"{path.name}: cannot be decompressed", "install it: apt-get install zstd")


class Archive:
    """cpio's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self):
        self._parts = []
        self._number = 0

    def add(self, name, mode, data=b""):
        self._number += 1
        path = name.encode() + b"\0"
        fields = (self._number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += [_padded(header + path), _padded(data)]

    def end(self):
        self._number = 0
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(data):
    return data + bytes(-len(data) % 4)
