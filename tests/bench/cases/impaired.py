"""Cases of a bad network: loss by chance on each leg, duplicates, reordering, and one
particular segment that is lost or that the capture does not see.

Loads are those of ``tests/lab/runs.py``, one at a time, so that each shows its own figures,
and one more whose clients think between requests: where all of a session's requests wait
already when the first is sent, a later one may repair what an earlier one has lost.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pycopy.kernel.attach import Hook
from pycopy.lab.topology import DEVICE
from pycopy.wire.segment import ACK, FIN, SYN
from tests.lab.dial import Client
from tests.lab.impair import LEGS, PASS_UNSEEN, PER_MILLION, Impairment

from .scene import Case, Scene

REPLAY, INTERCEPT = LEGS[1], LEGS[2]

RATES = {"0.1 %": 1_000, "1 %": 10_000, "5 %": 50_000}

LOADS: dict[str, dict[str, Any]] = {
    "keep-alive": {"requests": 503, "connections": 23, "answers": "1,1009"},
    "paced keep-alive": {"requests": 503, "connections": 23, "answers": "1,1009", "rate": 500},
    "short": {"requests": 211, "connections": 211, "short": 211, "answers": "1,1009"},
    "upload": {"requests": 53, "connections": 11, "uploads": 100_003, "answers": 1},
}

#: How long a client that thinks does so between its requests.
THINK_S = 0.1

#: What is lost: on which leg, and which segment of a connection of five requests.
SEGMENTS: dict[str, tuple[str, dict[str, int]]] = {
    "the SYN": (REPLAY, {"flags": SYN}),
    "the third ACK": (REPLAY, {"flags": ACK}),
    "the first request": (REPLAY, {"payload_bytes": 1}),
    "the third request": (REPLAY, {"payload_bytes": 1, "skip": 2}),
    "the FIN": (REPLAY, {"flags": FIN}),
    "the SYN-ACK": (INTERCEPT, {"flags": SYN}),
    "the third answer": (INTERCEPT, {"payload_bytes": 1, "skip": 2}),
    "the target's FIN": (INTERCEPT, {"flags": FIN}),
}


def _under_load(scene: Scene, load: dict[str, Any], leg: str = "", **what: int) -> None:
    scene.serve()
    scene.start()
    if leg:
        scene.impair(leg, **what)
    scene.load(**load)


def _five_requests(scene: Scene, name: str, think_s: float = 0.0) -> None:
    client = Client(scene.lab, 4, 80)
    for number in range(5):
        client.ask(f"{name}{number}", 1009)
        time.sleep(think_s)
    client.close()


def _one_lost(scene: Scene, leg: str, what: dict[str, int], think_s: float) -> None:
    scene.serve()
    scene.start()
    scene.impair(leg, drop_ppm=PER_MILLION, budget=1, **what)
    _five_requests(scene, "r", think_s)


def _one_unseen(scene: Scene) -> None:
    """The online server gets a segment that the capture does not: nobody will repeat it."""
    scene.serve()
    scene.start()
    client = Client(scene.lab, 4, 80)
    client.ask("before", 1009)
    scene.impairments.append(Impairment(
        scene.lab, "online", DEVICE, Hook.TC_INGRESS, destination_port=80, payload_bytes=1,
        skip=23, drop_ppm=PER_MILLION, budget=1, verdict=PASS_UNSEEN,
    ))  # fmt: skip
    client.ask("gap", 1009, 100_003)
    _five_requests(scene, "other")
    client.ask("behind", 1)
    client.close()


def _case(name: str, drive: Callable[..., None], **options: Any) -> Case:
    return Case(name, partial(drive, **options), offloads=False)


def cases() -> Iterator[Case]:
    """All of them, in the order of the table."""
    for name, load in LOADS.items():
        yield _case(f"no loss, {name}", _under_load, load=load)
    for leg in LEGS:
        for rate, ppm in RATES.items():
            for name, load in LOADS.items():
                yield _case(
                    f"loss {rate} {leg}, {name}", _under_load, load=load, leg=leg, drop_ppm=ppm
                )
    for what, option in (("duplicates", "duplicate_ppm"), ("reordering", "hold_ppm")):
        for name, load in LOADS.items():
            yield _case(
                f"{what} 5 % {REPLAY}, {name}",
                _under_load, load=load, leg=REPLAY, **{option: RATES["5 %"]},
            )  # fmt: skip
    for name, (leg, segment) in SEGMENTS.items():
        for pace, think_s in (("fast", 0.0), ("thinking", THINK_S)):
            yield _case(
                f"{name} is lost, {pace} client", _one_lost, leg=leg, what=segment, think_s=think_s
            )
    yield Case("a segment that the capture missed", _one_unseen, offloads=False, pycopy_only=True)
