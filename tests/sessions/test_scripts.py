"""Every script under this directory, for IPv4 and IPv6."""

from pathlib import Path

import pytest

from tests.sessions.runner import Failed, Script

HERE = Path(__file__).parent
SCRIPTS = sorted(str(path.relative_to(HERE)) for path in HERE.glob("*/*.pkt"))


@pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, family):
    text = (HERE / name).read_text()
    try:
        Script(text, family).run()
    except Failed as failure:
        pytest.fail(f"{name}\n{failure}", pytrace=False)
