"""Stock kernels out of Debian's packages: choose, fetch and unpack them into a cache directory.

apt does the work, with state, cache and sources of its own: the machine's are never touched.
The mirror is the one of the machine's own sources, asked for other suites. Knows nothing of
guests; what it hands on is a :class:`Kernel`, an image and a directory of modules.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from pycopy.errors import HostUnfit, PycopyError, UsageError

DIRECTORY = Path("/var/tmp/pycopy-kernels")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

#: Where the kernels of a series are; a plain name is a suite of the main archive.
SUITES = {
    "5.10": ("bullseye",),
    "6.1": ("bookworm", "bookworm-security"),
    "6.12": ("trixie", "trixie-security"),
}
OTHER_SUITES = ("trixie-backports", "sid")
#: What README promises, and the ends of it.
DEFAULT_KERNELS = ("6.1", "6.12", "6.16", "6.18", "7.x")

_NAME = re.compile(r"(\d+)\.(\d+|x)")
#: The plain flavour: the cloud kernels of Debian have no 9p, over which the guest has its root.
_IMAGE = r"linux-image-{}(?:[.+-][\w.+-]*)?-amd64"
_OTHER_FLAVOURS = ("-cloud-", "-rt-")
#: Two thirds of a kernel package, and nothing that a guest without hardware could want.
_UNWANTED = tuple(
    f"*/kernel/{path}"
    for path in (
        "sound drivers/gpu drivers/media drivers/net/wireless drivers/net/ethernet drivers/usb"
        " drivers/infiniband drivers/staging drivers/iio drivers/scsi drivers/hid drivers/input"
        " drivers/hwmon drivers/mtd drivers/bluetooth drivers/thunderbolt drivers/platform"
        " drivers/comedi drivers/md drivers/accel drivers/leds drivers/power drivers/edac fs/xfs"
        " fs/btrfs fs/ocfs2 fs/ceph fs/nfs fs/nfsd fs/smb fs/bcachefs"
    ).split()
)


@dataclass
class Kernel:
    """Something to boot; ``version`` is the package's, or where it came from."""

    name: str
    release: str
    version: str
    image: str
    modules: str


def directory():
    """Where everything that was fetched is kept."""
    return Path(os.environ.get("PYCOPY_KERNELS", DIRECTORY)).resolve()


def kernel(name, refresh=False):
    """The kernel of that name, fetched unless it is there; ``IMAGE:MODULES`` is one by path."""
    if ":" in name:
        return _by_path(name)
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} names no kernel", "name a series such as 6.1 or 7.x, or give IMAGE:MODULES"
        )
    kept = directory() / f"linux-{name}"
    with locked():
        if not refresh:
            with contextlib.suppress(OSError, ValueError):
                return Kernel(**json.loads((kept / "kernel.json").read_text()))
        return _fetch(name, kept)


def _by_path(name):
    image, _, modules = name.partition(":")
    image, modules = Path(image).resolve(), Path(modules).resolve()
    if not image.is_file() or not (modules / "modules.dep").is_file():
        raise UsageError(
            f"{name}: no image, or no modules.dep in the directory of modules",
            "give them as /boot/vmlinuz-X:/lib/modules/X, after depmod X",
        )
    return Kernel(modules.name, modules.name, str(image), str(image), str(modules))


def _fetch(name, kept):
    apt = Apt()
    apt.update(suites_of(name))
    package = choose(name, apt.names())
    if package is None:
        raise PycopyError(
            f"no kernel {name} in {', '.join(suites_of(name))} of {mirrors()[0]}",
            "name another series; 'apt-cache search linux-image' lists what a suite has",
        )
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    version = apt.version(package)
    for part in [package, *apt.parts(package)]:
        unpack(apt.download(part), kept)
    release = package.removeprefix("linux-image-")
    modules = next((path for path in kept.glob(f"**/lib/modules/{release}")), None)
    # Since 7.2 the image is among the modules.
    images = [kept / f"boot/vmlinuz-{release}", kept / f"usr/lib/modules/{release}/vmlinuz"]
    image = next((path for path in images if path.exists()), None)
    if modules is None or image is None:
        cure = "name another series, and report this as a bug"
        raise PycopyError(f"{package} {version} has no image or no modules where both were", cure)
    _run(["depmod", "-b", str(modules.parents[2]), release], "see what depmod says above")
    found = Kernel(name, release, version, str(image), str(modules))
    (kept / "kernel.json").write_text(json.dumps(asdict(found)))
    return found


def suites_of(name):
    return SUITES.get(name, OTHER_SUITES)


def choose(name, names):
    """Of package names, the newest kernel of a series; None where there is none."""
    major, minor = _NAME.fullmatch(name).groups()
    series = rf"{major}\.\d+" if minor == "x" else re.escape(name)
    pattern = re.compile(_IMAGE.format(series))
    found = [
        each
        for each in names
        if pattern.fullmatch(each)
        and any(char.isdigit() for char in each.removeprefix("linux-image-"))
        and not any(flavour in each for flavour in _OTHER_FLAVOURS)
        # Metapackages end with the series: their version says nothing of a release.
        and not re.fullmatch(rf"linux-image-{series}-amd64", each)
    ]
    return max(found, key=_order, default=None)


def _order(name):
    """6.12.118+deb13 is newer than 6.12.90+deb13.1: numbers by value."""
    return [int(number) for number in re.findall(r"\d+", name)[:-1]]


@cache
def mirrors():
    """(archive, security archive) of the machine's own sources for its own Debian."""
    text = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages"],
        capture_output=True, text=True, check=False, env=_plain_environment(),
    ).stdout  # fmt: skip
    return mirrors_in(text, _codename())


def mirrors_in(targets, codename):
    """Of lines "URI codename", the mirror of ``codename`` and that of its security updates."""
    found = {}
    for line in targets.splitlines():
        uri, _, suite = line.partition(" ")
        found.setdefault(suite, uri)
    if codename not in found:
        raise HostUnfit(
            "apt's sources name no mirror of Debian, from which the kernels would come",
            "run this on Debian, or give kernels as IMAGE:MODULES",
        )
    main = found[codename]
    return main, found.get(f"{codename}-security", main)


def _codename():
    text = Path("/etc/os-release").read_text(encoding="utf-8")
    found = re.search(r"^VERSION_CODENAME=(\S+)", text, re.M)
    return found[1] if found and re.search(r"^ID=debian$", text, re.M) else "none"


def _plain_environment():
    return {key: value for key, value in os.environ.items() if key != "APT_CONFIG"}


class Apt:
    """The ordinary client, with directories of its own."""

    def __init__(self):
        self.dir = directory() / "apt"
        for part in ("lists/partial", "cache/archives/partial"):
            (self.dir / part).mkdir(parents=True, exist_ok=True)
        (self.dir / "status").touch()
        settings = {
            "Dir::State": self.dir,
            "Dir::State::lists": self.dir / "lists",
            "Dir::State::status": self.dir / "status",
            "Dir::Cache": self.dir / "cache",
            "Dir::Etc::sourcelist": self.dir / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferencesparts": "-",
            "APT::Get::List-Cleanup": "0",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        text = "".join(f'{key} "{value}";\n' for key, value in settings.items())
        (self.dir / "apt.conf").write_text(text)
        self._env = {**os.environ, "APT_CONFIG": str(self.dir / "apt.conf"), "LC_ALL": "C"}

    def update(self, suites):
        """Fetch the indexes of these suites, which are all that is known from then on."""
        archive, security = mirrors()
        lines = [
            f"deb [signed-by={KEYRING}] {security if '-security' in suite else archive}"
            f" {suite} main\n"
            for suite in suites
        ]
        (self.dir / "sources.list").write_text("".join(lines))
        self._apt("apt-get", "update", "--error-on=any")

    def names(self):
        return self._apt("apt-cache", "pkgnames", "linux-image-").split()

    def version(self, package):
        """That of the newest, which is what ``download`` fetches."""
        return self._field(package, "Version")

    def parts(self, package):
        """What a kernel of 7.x is divided into: linux-binary-..., linux-modules-..."""
        release = package.removeprefix("linux-image-")
        depends = self._field(package, "Depends")
        return re.findall(rf"\blinux-(?:binary|modules)-{re.escape(release)}", depends)

    def _field(self, package, name):
        text = self._apt("apt-cache", "show", "--no-all-versions", package)
        found = re.search(rf"^{name}: (.*)$", text, re.M)
        return found[1] if found else ""

    def download(self, package):
        """The file; a trial after the other is apt's business."""
        into = self.dir / "cache" / "downloads"
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        self._apt("apt-get", "download", package, cwd=into)
        return next(into.glob("*.deb"))

    def _apt(self, *command, cwd=None):
        cure = "see what apt says above; without a network, give kernels as IMAGE:MODULES"
        return _run([command[0], "-q", *command[1:]], cure, env=self._env, cwd=cwd)


def unpack(package, into):
    """A kernel package's files but for what no guest uses; the package is removed."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as pack:
        excludes = [f"--exclude={pattern}" for pattern in _UNWANTED]
        _run(
            ["tar", "-x", "-C", str(into), *excludes],
            "is there room for it?", stdin=pack.stdout,
        )  # fmt: skip
    if pack.returncode != 0:
        raise PycopyError(f"{package.name} cannot be unpacked", "remove the cache and try again")
    package.unlink()


def _run(command, cure, **options):
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except FileNotFoundError:
        raise HostUnfit(f"{command[0]} is not installed", "run contrib/setup kernels") from None
    if done.returncode != 0:
        said = "\n    ".join(done.stderr.strip().splitlines()[-8:])
        raise PycopyError(f"{' '.join(command[:4])}: status {done.returncode}:\n    {said}", cure)
    return done.stdout


@contextlib.contextmanager
def locked(name="lock"):
    """No other run changes the cache meanwhile."""
    directory().mkdir(parents=True, exist_ok=True)
    with (directory() / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
