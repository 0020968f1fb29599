"""Cases of what connections go through: odd targets, ports and clients, joining, protocols.

The traffic is that of the lab tests (``tests/lab/traffic.py``), the targets are theirs
(``tests/lab/odd.py``, ``tests/lab/databases.py``).
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pycopy.lab.servers import Server
from tests.lab import traffic
from tests.lab.databases import MariaDB, Nginx2, PostgreSQL, Redis
from tests.lab.dial import Client
from tests.lab.exact import Exact
from tests.lab.odd import Odd

from .scene import Case, Scene

#: A rate at which every answer is there before the next request, as with people.
_PACED = {"requests": 503, "connections": 23, "rate": 1000, "answers": "1,1009"}


def _late(scene: Scene) -> None:
    scene.serve(target=partial(Odd, mode="late"))
    scene.start()
    client = Client(scene.lab, 4, 80)
    client.ask("late", 1009, 8_000_009)
    client.ask("after", 1)
    client.close()


def _target(scene: Scene, mode: str, load: dict[str, Any]) -> None:
    scene.serve(target=partial(Odd, mode=mode))
    scene.start()
    scene.load(**load)


def _both_greet(scene: Scene) -> None:
    """A protocol in which the server speaks first."""
    scene.serve(online=partial(Exact, protocol="line"))
    scene.start()
    scene.load(503, 23, protocol="line", answers="1,1009")


def _clients(scene: Scene, clients: Callable[..., None], ports: int = 1, **options: Any) -> None:
    for number in range(ports):
        scene.serve(80 + number)
    scene.start()
    clients(scene.lab, **options)


def _resets(scene: Scene) -> None:
    _clients(scene, traffic.clients_reset)
    scene.load(101, 11, id="after")


def _joined(scene: Scene) -> None:
    """What is asked before the replayer was there counts on neither side."""
    scene.serve()
    clients = [Client(scene.lab, 4, 80, index=index) for index in range(23)]
    for number, client in enumerate(clients):
        client.ask(f"before{number}", 1009)
    scene.start()
    scene.online[0].forget()
    # Whoever joins cannot tell a request that comes at once from the rest of one: let it be idle.
    time.sleep(0.3)
    for round_ in range(3):
        for number, client in enumerate(clients):
            client.ask(f"after{number}.{round_}", 1009, 10_007 * (round_ == 1))
    for client in clients:
        client.close()


def _database(
    scene: Scene, port: int, kind: Callable[..., Server], talk: Callable[..., None]
) -> None:
    scene.serve(port, online=kind)
    scene.start()
    talk(scene.lab, scene.wait_same)


def _protocol(
    scene: Scene, port: int, kind: Callable[..., Server], talk: Callable[..., None]
) -> None:
    scene.serve(port, online=kind)
    scene.start()
    talk(scene.lab)


def _case(name: str, drive: Callable[..., None], **options: Any) -> Case:
    return Case(name, partial(drive, **options))


def cases() -> Iterator[Case]:
    """All of them, in the order of the table."""
    yield Case("8 MB upload, target reads 3 s late", _late)
    fast = {"requests": 503, "connections": 23, "answers": "1,1009"}
    for mode, name in (("closes", "closes"), ("resets", "resets")):
        for pace, load in (("paced", _PACED), ("fast", fast)):
            yield _case(
                f"target {name} after every answer, {pace} clients", _target, mode=mode, load=load
            )
    yield Case("both servers greet first", _both_greet)
    yield _case("only the target greets first", _target, mode="greets", load=_PACED)
    yield _case("target answers shorter", _target, mode="curt", load=_PACED)
    yield _case("target answers longer", _target, mode="verbose", load=_PACED)
    yield _case(
        "one client port towards two copied ports", _clients, clients=traffic.two_at_a_time, ports=2
    )
    yield Case("clients reset", _resets)
    yield _case(
        "client port used again at once, server closes",
        _clients, clients=traffic.port_used_again, reset=False,
    )  # fmt: skip
    yield _case(
        "client port used again at once, client resets",
        _clients, clients=traffic.port_used_again, reset=True,
    )  # fmt: skip
    yield Case("replay started while connections are open", _joined)
    yield _case("PostgreSQL (rows)", _database, port=5432, kind=PostgreSQL, talk=traffic.postgresql)
    yield _case("MariaDB (rows)", _database, port=3306, kind=MariaDB, talk=traffic.mysql)
    yield _case("Redis (keys)", _protocol, port=6379, kind=Redis, talk=traffic.redis)
    yield _case("HTTP/2, clear text", _protocol, port=80, kind=Nginx2, talk=traffic.http2)
