"""What no path falls short of: the limits of RFC 1191 and 8201, which differ by family."""

import pytest

from pycopy.session.fates import ResponseFate
from tests.sessions.runner import KIND_TOO_BIG, Script

IN_FLIGHT = """
+0 * open
+0 client < P. 1:1401(1400) ack 1
+0 target > P. 1:1401(1400) ack 1
"""


@pytest.mark.parametrize(
    ("family", "mtu", "fate"),
    [
        (4, 552, ResponseFate.STEERED),
        (4, 551, ResponseFate.UNACCEPTABLE),
        (6, 1280, ResponseFate.STEERED),
        (6, 1279, ResponseFate.UNACCEPTABLE),
    ],
)
def test_the_smallest_path(family, mtu, fate):
    script = Script(IN_FLIGHT, family)
    for line in script.lines:
        if line:
            script.step(line)
    before = script.ledger.responses[fate]
    connection = script.connection(1)
    script.on_target(script.segment(KIND_TOO_BIG, connection.key, connection.iss + 1, 0, mss=mtu))
    assert script.ledger.responses[fate] == before + 1
