"""``--workers``: which part of a run is one worker's, and the sum of all their ledgers.

Every worker is a replay of its own. Flows are shared out by the client's port, which the
copy keeps where clients keep their addresses or are mapped (-c); so each worker has source
ports towards the target that no other takes, and knows a response that is its own. In the
zero-route mode each has a part of the range instead. Nothing here touches the host.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

from pycopy.command.config import WORKER_MEMORY_MB, ReplayConfig
from pycopy.errors import UsageError
from pycopy.report.picture import BALANCED, Snapshot, Value
from pycopy.session.addresses import worker_of

#: The intercept takes as many replays.
MOST = 64
#: In the zero-route mode each worker has two programs on a device, and a TCX hook has room for
#: 64 (BPF_MPROG_MAX); some are left for others.
MOST_ALONE = 30

_PORT_AT = 32  #: of the client's in KEY, 2 bytes


class Own:
    """Tells this worker's connections to the target from the others', by the client's port."""

    def __init__(self, config: ReplayConfig) -> None:
        workers, worker = config.workers, config.worker
        self._ports = bytes(worker_of(port, workers) == worker for port in range(1 << 16))

    def has(self, key: bytes) -> bool:
        """Whether ``key`` (KEY) may be a connection of this worker's."""
        return bool(self._ports[key[_PORT_AT] << 8 | key[_PORT_AT + 1]])


def check(config: ReplayConfig) -> None:
    """Refuse what cannot be shared by so many."""
    workers = config.workers
    if workers == 1:
        return
    if config.hook == "xdp":
        raise UsageError(
            "--workers with --hook xdp: a device has room for one XDP program, not for one each",
            "leave one of the two out",
        )
    if config.max_sessions < workers:
        raise UsageError(
            f"--max-sessions {config.max_sessions} leaves none of {workers} workers a session",
            f"write --max-sessions {workers} or more",
        )
    if config.memory_mb < WORKER_MEMORY_MB * workers:
        raise UsageError(
            f"-m {config.memory_mb} is less than {WORKER_MEMORY_MB} MB for each of {workers}"
            " workers",
            f"write -m {WORKER_MEMORY_MB * workers}, or fewer workers",
        )


def split(config: ReplayConfig, ports: tuple[int, int] | None) -> list[ReplayConfig]:
    """Each worker's own configuration. ``ports``: the range of the zero-route mode."""
    workers = config.workers
    parts: list[tuple[int, int] | None] = [None] * workers
    if ports is not None:
        parts = [*split_ports(ports, workers)]
    return [
        replace(
            config, worker=worker, self_ports=part, memory_mb=config.memory_mb // workers,
            max_sessions=config.max_sessions // workers + (worker < config.max_sessions % workers),
        )
        for worker, part in enumerate(parts)
    ]  # fmt: skip


def split_ports(ports: tuple[int, int], workers: int) -> list[tuple[int, int]]:
    """``workers`` neighbouring ranges, inclusive like ``ports``, which they fill."""
    low, high = ports
    number = high - low + 1
    if number < workers:
        raise UsageError(
            f"ports {low}-{high} are too few for {workers} workers", "give a wider range (--ports)"
        )
    starts = [low + number * worker // workers for worker in range(workers + 1)]
    return [(first, after - 1) for first, after in pairwise(starts)]


def total(ledgers: Iterable[Snapshot]) -> dict[str, dict[str, Value]]:
    """All ledgers as one. It balances if each of them does, and says so only if each does."""
    ledgers = list(ledgers)
    sections: dict[str, dict[str, Value]] = {}
    for ledger in ledgers:
        for name, section in ledger.items():
            _add(sections.setdefault(name, {}), section)
    for name, section in sections.items():
        if BALANCED in section:
            verdicts = [ledger.get(name, {}).get(BALANCED) for ledger in ledgers]
            del section[BALANCED]
            if None not in verdicts:
                section[BALANCED] = "yes" if set(verdicts) == {"yes"} else "no"
        if "kernel_percent" in section:
            kernel, user = (section.get(f"{who}_segments", 0) for who in ("kernel", "user"))
            assert isinstance(kernel, int) and isinstance(user, int)
            both = kernel + user
            section["kernel_percent"] = round(100 * kernel / both, 2) if both else 0.0
    return sections


def _add(section: dict[str, Value], other: Mapping[str, Value]) -> None:
    for key, value in other.items():
        before = section.get(key, 0)
        if isinstance(value, str) or isinstance(before, str):
            section[key] = value
        else:
            section[key] = before + value
