"""One command on one kernel: a guest whose root is this machine's own, below a layer in memory.

    python3 -m tests.kernels.guest 6.1 -- uname -a

qemu emulates it (TCG: machines that run CI have no KVM that could be counted on), with an
initramfs of :mod:`tests.kernels.initramfs`, no disk and no network. What the guest writes goes
to memory, except what it writes to the exchange directory, ``/run/exchange``. A guest that was
started ends with its limit, with its starter, and with ``stop``.
"""

import argparse
import contextlib
import ctypes
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pycopy.errors import HostUnfit, PycopyError
from pycopy.lab.demo import interrupted_by_sigterm

from . import initramfs, packages

QEMU = "qemu-system-x86_64"
#: The distribution's own, which has bcc and pyroute2.
PYTHON = "/usr/bin/python3"
CHECKOUT = Path(__file__).resolve().parents[2]
EXCHANGE = "/run/exchange"
LIMIT_S = 900
BOOT_S = 120
#: Of the output of a guest that failed before it began: what its kernel said last.
_LAST_LINES = 15
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

#: The first process of the root: mounts what a system has, runs the command, powers off.
_INIT = """\
mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
ln -s /proc/self/fd /dev/fd
for each in 0:stdin 1:stdout 2:stderr; do ln -s /proc/self/fd/${{each%:*}} /dev/${{each#*:}}; done
mkdir -p /run/lock /run/netns
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
hostname guest
ip link set lo up
stty -F /dev/ttyS1 raw -echo
echo booted >{exchange}/booted
cd {cwd}
env -i {environment} {command} </dev/null >/dev/ttyS1 2>&1
echo $? >{exchange}/status.new
mv {exchange}/status.new {exchange}/status
sync
exec /run/busybox poweroff -f
"""


def die_with_parent():
    """Between fork and exec: whatever ends the starter, ``kill -9`` included, ends it."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


class Guest:
    """A running guest; ``output`` is what to wait for, ``read()`` what the command printed."""

    def __init__(self, kernel, command, exchange, *, cpus=2, memory_mb=2048, limit_s=LIMIT_S):
        self.kernel = kernel
        self.exchange = Path(exchange)
        self.limit_s = limit_s
        self.begin_s = time.monotonic()
        self._machine = ["-m", str(memory_mb), "-smp", str(cpus)]
        self._text = b""
        self._begun_again = False
        self._write_init(command)
        self._dir = Path(tempfile.mkdtemp(prefix="pycopy-guest-"))
        try:
            initramfs.build(kernel.modules, self._dir / "initramfs")
            self._start()
        except BaseException:
            shutil.rmtree(self._dir)
            raise

    def _write_init(self, command):
        self.exchange.mkdir(parents=True, exist_ok=True)
        for name in ("booted", "status"):
            (self.exchange / name).unlink(missing_ok=True)
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(CHECKOUT),
        }
        text = _INIT.format(
            cwd=shlex.quote(os.getcwd()),
            command=shlex.join(command),
            environment=shlex.join(f"{key}={value}" for key, value in environment.items()),
            exchange=EXCHANGE,
        )
        (self.exchange / "init").write_text(text)

    def _start(self):
        self._started_s = time.monotonic()
        line = "console=ttyS0 rdinit=/init panic=-1 loglevel=5 mitigations=off nokaslr"
        command = [QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", *self._machine]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-no-reboot", "-kernel", self.kernel.image, "-append", line]
        command += ["-initrd", str(self._dir / "initramfs")]
        command += ["-serial", f"file:{self._dir}/console", "-serial", "stdio"]
        for tag, path, options in (
            ("root", "/", ",readonly=on,multidevs=remap"),
            ("modules", self.kernel.modules, ",readonly=on,multidevs=remap"),
            ("exchange", self.exchange.resolve(), ",multidevs=remap"),
        ):
            command += ["-fsdev", f"local,id={tag},path={path},security_model=none{options}"]
            command += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        try:
            with (self._dir / "qemu").open("wb") as errors:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
        except FileNotFoundError:
            cure = "install it: apt-get install qemu-system-x86"
            raise HostUnfit(f"{QEMU} is not installed", cure) from None
        self.output = self._process.stdout
        os.set_blocking(self.output.fileno(), False)

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.stop()

    def read(self):
        """Whole lines that it has printed since; at its end, what there is."""
        while data := self.output.read(65536):
            self._text += data
        if data is None:
            lines, _, self._text = self._text.rpartition(b"\n")
        else:
            lines, self._text = self._text, b""
        return lines.decode(errors="replace").splitlines()

    @property
    def ended(self):
        return self._process.poll() is not None

    @property
    def _process_age_s(self):
        return time.monotonic() - self._started_s

    @property
    def elapsed_s(self):
        return time.monotonic() - self.begin_s

    @property
    def console(self):
        """What its kernel said, without what terminals would make of it."""
        path = self._dir / "console"
        text = path.read_text(errors="replace") if path.exists() else ""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1bc|\r", "", text)

    @property
    def booted(self):
        return (self.exchange / "booted").exists()

    def check_limits(self):
        """Begin again when it hangs on the way up, once; give up when its time is over."""
        if not self.booted and self._process_age_s > BOOT_S and not self._begun_again:
            # Under a busy TCG a CPU may miss the timer that it waits for, and all wait for it.
            self._begun_again = True
            self._kill()
            self._start()
        elif self.elapsed_s > self.limit_s:
            where = "not done" if self.booted else "not booted"
            raise PycopyError(
                f"{self.kernel.name}: {where} after {self.limit_s:.0f} s; its kernel said last:"
                f"\n    {self._last_words()}",
                "give it more with --limit, or see what else keeps this machine busy",
            )

    def status(self):
        """The command's exit status; a guest without one did not get that far."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.exchange / "status").read_text())
        said = (self._dir / "qemu").read_text(errors="replace").strip()
        if self._process.returncode == -signal.SIGKILL:
            said = "somebody killed qemu; did this machine run out of memory (dmesg)?"
        raise PycopyError(
            f"{self.kernel.name}: the guest ended before its command did:"
            f"\n    {said or self._last_words()}",
            f"see what its kernel says: {self.kernel.image}",
        )

    def _last_words(self):
        return "\n    ".join(self.console.splitlines()[-_LAST_LINES:]) or "nothing"

    def stop(self):
        """End it, whatever it does; nothing of it stays but the exchange directory."""
        self._kill()
        if self._dir.exists():
            with contextlib.suppress(OSError):
                shutil.copy(self._dir / "console", self.exchange / "console")
            shutil.rmtree(self._dir)

    def _kill(self):
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self.output.close()


def follow(starters, at_once, say, done):
    """Run the guests that ``starters`` make, ``at_once`` of them at a time, to their ends.

    ``say(guest, line)`` for each line that one prints, ``done(guest, error)`` for each that
    ended, or that was ended because its time was over; ``error`` is None or says so.
    """
    waiting, running = list(reversed(starters)), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop()())
            select.select([guest.output for guest in running], [], [], 1.0)
            for guest in list(running):
                error = _advance(guest, say)
                if error is not None or guest.ended:
                    running.remove(guest)
                    guest.stop()
                    done(guest, error)
    finally:
        for guest in running:
            guest.stop()


def _advance(guest, say):
    ended = guest.ended  # before its last words are read
    for line in guest.read():
        say(guest, line)
    try:
        if ended:
            guest.status()
        else:
            guest.check_limits()
    except PycopyError as error:
        return error
    return None


def main():
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.kernels.guest", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("kernel", help="a series (6.1, 7.x), or IMAGE:MODULES")
    parser.add_argument("command", nargs="+", help="what to run there, here being its directory")
    parser.add_argument("--exchange", help=f"a directory that is {EXCHANGE} in the guest")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=2048, metavar="MB")
    parser.add_argument("--console", action="store_true", help="print what its kernel said")
    arguments = parser.parse_args()
    try:
        with interrupted_by_sigterm(), contextlib.ExitStack() as stack:
            exchange = arguments.exchange or stack.enter_context(tempfile.TemporaryDirectory())
            kernel = packages.kernel(arguments.kernel)
            print(f"{kernel.release} ({kernel.version})", file=sys.stderr)
            ended = []
            follow(
                [
                    lambda: Guest(
                        kernel, arguments.command, exchange, cpus=arguments.cpus,
                        memory_mb=arguments.memory, limit_s=arguments.limit,
                    )
                ],
                1,
                lambda _guest, line: print(line, flush=True),
                lambda guest, error: ended.extend((guest, error)),
            )  # fmt: skip
            guest, error = ended
            if arguments.console:
                print(Path(exchange, "console").read_text(errors="replace"), file=sys.stderr)
            print(f"{guest.elapsed_s:.1f} s", file=sys.stderr)
            if error is not None:
                raise error
            return guest.status()
    except PycopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
