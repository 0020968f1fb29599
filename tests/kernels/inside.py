"""What is done on one kernel: load every object, copy real traffic, kill, impair.

    python3 -P -m tests.kernels.inside PLAN RESULTS

In a guest, or on the running kernel (``--here``). Reads what to do from a JSON file and writes
one JSON object a line of what came of it; a step that fails is a line, and the next one is
done all the same. Knows nothing of guests, except that they are slow: see ``PATIENCE``.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pycopy.errors import PycopyError
from pycopy.kernel import syscall
from pycopy.kernel.module import lift_memory_limit
from pycopy.lab import copying, servers
from pycopy.lab.copying import Copying, LoadRun, Placement, wait_settled
from pycopy.lab.servers import Nginx
from pycopy.lab.topology import SWITCH, Lab

#: Verified instructions of one program: half of what the kernel would accept, so that a
#: kernel whose verifier prunes less accepts it still.
MOST_INSTRUCTIONS = 500_000
#: Of segments that never reached user space, in percent; and how many may, whatever the share
#: is: in a short run the first ones of each session count.
LEAST_PERCENT, MOST_USER_SEGMENTS = 95.0, 20
#: An emulated CPU is 10 to 20 times slower, and imports take it seconds.
PATIENCE = 6
ANSWERS = (1, 211, 1009, 10007)
#: Requests per second: what two emulated CPUs serve, copy and serve again.
RATE = 40

_DELAY = "delay 20ms"
#: On the way from replay to target, or both ways.
IMPAIRMENTS = (
    _DELAY,
    f"{_DELAY} reorder 25% 50%",
    "duplicate 5%",
    f"{_DELAY} loss 1%",
    f"{_DELAY} loss 5%",
)
LEGS = ("there", "both")


class Report:
    """Lines of results, each written at once: a guest may end at any time."""

    def __init__(self, path):
        self._path = Path(path)

    @contextlib.contextmanager
    def step(self, kind, **row):
        """One line, ``row`` filled by the block; good unless the block raises."""
        what = " ".join(str(value) for value in row.values())
        print(f"{kind} {what}", flush=True)
        begin_s = time.monotonic()
        row = {"kind": kind, "good": True, "problem": "", **row}
        try:
            yield row
        except Exception as error:  # a bug in one step must not hide the other steps
            row["good"] = False
            name = "" if isinstance(error, PycopyError) else f"{type(error).__name__}: "
            row["problem"] = f"{name}{error}"
        row["seconds"] = round(time.monotonic() - begin_s, 1)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not row["good"]:
            print(f"  {row['problem']}", flush=True)


def require(condition, problem):
    if not condition:
        raise PycopyError(problem)


# -- loading ---------------------------------------------------------------------------------


def load_objects(report, sets):
    """Every object of every compiler, into this kernel's verifier and out again."""
    from pycopy.kernel import objects

    lift_memory_limit()
    for compiler, directory in sets.items():
        for name in objects.CATALOGUE:
            with report.step("object", compiler=compiler, object=name) as row:
                counts = objects.try_load(Path(directory), name)
                row["programs"] = counts
                row["instructions"] = most = max(counts.values())
                require(
                    most <= MOST_INSTRUCTIONS,
                    f"{most:,} instructions verified; more than {MOST_INSTRUCTIONS:,} is too near"
                    " to what a kernel refuses",
                )


# -- copying ---------------------------------------------------------------------------------


class Scene:
    """A lab with nginx on both ends; what each copying left behind is asked of the kernel."""

    def __init__(self, lab, online, target):
        self.lab = lab
        self.online = online
        self.target = target
        self._runs = 0

    @contextlib.contextmanager
    def step(self, report, kind, **row):
        """As the report's, and nothing of a step that failed is left for the next one."""
        with report.step(kind, **row) as row:
            yield row
        if not row["good"]:
            self.clean()

    def copy(self, row, placement, family, requests, *, kernel_share=True):
        """One copying, held to what pycopy promises; fills the row of the table."""
        row.update(requests=0, lost=0, surplus=0, kernel_percent=0.0)
        self._runs += 1
        mark, before = f"m{self._runs}-", self.target.count()
        with Copying(self.lab, Placement(placement), family) as run:
            result = self._load(family, requests, mark)
            wait_settled(lambda: self.target.count() - before, requests, patience_s=20)
            outcome = run.stop()
        asked = self.online.served().matching(f"id={mark}")
        copied = self.target.served().matching(f"id={mark}")
        row["requests"] = copied.count
        row["lost"], row["surplus"] = asked.lost(copied).total(), asked.surplus(copied).total()
        (replay,) = outcome.replays
        share = replay["ledger"].get("fastpath", {})
        row["kernel_percent"] = share.get("kernel_percent", 0.0)
        require(result["ok"], f"the online service failed: {result['errors']}")
        require(asked.count == requests, f"{asked.count} of {requests} requests were served online")
        require(not row["lost"] and not row["surplus"], "the target was not asked the same")
        require(outcome.balanced, "a ledger does not balance")
        if kernel_share:
            require(outcome.fastpath == "on", f"the fast path was {outcome.fastpath}")
            few = "kernel_percent" in share and share["user_segments"] <= MOST_USER_SEGMENTS
            require(
                few or row["kernel_percent"] >= LEAST_PERCENT,
                f"only {row['kernel_percent']} % of the segments stayed in the kernel: {share}",
            )
        self._require_nothing_attached()

    def _load(self, family, requests, mark):
        connections = max(requests // 5, 1)
        return LoadRun(
            self.lab, family, "online", 80,
            *("--requests", str(requests), "--connections", str(connections)),
            *("--short", str(connections // 3), "--concurrency", "8", "--rate", str(RATE)),
            *("--answers", ",".join(map(str, ANSWERS)), "--id", mark),
            *("--time-limit", str(requests / RATE * 3 + 60)),
        ).result(timeout_s=requests / RATE * 3 + 120)  # fmt: skip

    def _require_nothing_attached(self, role="", patience_s=5.0):
        deadline = time.monotonic() + patience_s
        while (left := attached_on(self.lab, role)) and time.monotonic() < deadline:
            time.sleep(0.2)
        require(not left, f"still attached: {'; '.join(left)}")

    # -- kill -9 -------------------------------------------------------------------------

    def kill(self, row, placement):
        """Replay, then intercept: nothing is attached; without TCX, after ``pycopy detach``."""
        row["detach"] = ""
        with Copying(self.lab, Placement(placement), 4) as run:
            result = self._load(4, 11, "kill-")
            require(result["ok"], f"the online service failed: {result['errors']}")
            for program in reversed(run.programs):
                program.kill()
                if not has_tcx() and attached_on(self.lab, program.role):
                    row["detach"] = self._detach(program.role).strip().splitlines()[-1]
                self._require_nothing_attached(program.role)
        self._require_nothing_attached()

    def clean(self):
        """After a step that failed: what it left must not fail the next one."""
        for role in self.lab.roles:
            if not has_tcx() and attached_on(self.lab, role):
                with contextlib.suppress(PycopyError):
                    self._detach(role)

    def _detach(self, role):
        command = [sys.executable, "-P", "-m", "pycopy", "detach"]
        return self.lab.run(role, command, timeout_s=30 * PATIENCE).stdout or "nothing removed"


def attached_on(lab, role=""):
    """The programs on one host of the lab, or on all."""
    from tests.lab.conftest import attached

    return [line for line in attached(lab) if line.startswith(f"{role}:" if role else "")]


def has_tcx():
    """Asked of the loopback device: TCX came with Linux 6.6 (e420bed02507)."""
    try:
        syscall.attached(1, syscall.TCX_INGRESS)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def impaired(lab, impairment, leg):
    """netem towards the target, and from it where the leg is ``both``."""
    places = [(SWITCH, "target"), ("target", "eth0")][: 2 if leg == "both" else 1]
    try:
        for role, device in places:
            netem = ["netem", "limit", "10000", *impairment.split()]
            lab.run(role, ["tc", "qdisc", "replace", "dev", device, "root", *netem])
        yield
    finally:
        for role, device in places:
            with contextlib.suppress(PycopyError):
                lab.run(role, ["tc", "qdisc", "del", "dev", device, "root"])


# -- all of it -------------------------------------------------------------------------------


def be_patient():
    """Wait longer for whatever starts or stops."""
    copying.READY_S *= PATIENCE
    copying.STOP_S *= PATIENCE
    servers.READY_S *= PATIENCE


def run(plan, report):
    if plan["objects"]:
        load_objects(report, plan["objects"])
    if not (plan["copies"] or plan["kills"] or plan["netem"]):
        return
    be_patient()
    with contextlib.ExitStack() as stack:
        with report.step("lab") as row:
            lab = stack.enter_context(Lab(f"pycopy-kernels-{os.getpid()}"))
            online = stack.enter_context(Nginx(lab, "online", 80, ANSWERS))
            target = stack.enter_context(Nginx(lab, "target", 8080, ANSWERS))
            scene = Scene(lab, online, target)
        if not row["good"]:
            return
        for placement, family in plan["copies"]:
            with scene.step(report, "copy", placement=placement, family=family) as row:
                scene.copy(row, placement, family, plan["requests"])
        for placement in plan["kills"]:
            with scene.step(report, "kill -9", placement=placement) as row:
                scene.kill(row, placement)
        for impairment, leg in plan["netem"]:
            with scene.step(report, "netem", impairment=impairment, leg=leg) as row:
                subprocess.run(["modprobe", "-q", "sch_netem"], check=False)
                with impaired(lab, impairment, leg):
                    scene.copy(row, "target", 4, plan["requests"], kernel_share=False)


def main(plan, results):
    report = Report(results)
    with report.step("kernel", release=os.uname().release):
        plan = json.loads(Path(plan).read_text())
    run(plan, report)
    with report.step("end"):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
