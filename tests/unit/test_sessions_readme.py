"""tests/sessions/README.md says what the runner does: its example runs, no word is missing."""

import re
from pathlib import Path

import pytest

from tests.sessions.runner import Failed, Script

SESSIONS = Path(__file__).parents[1] / "sessions"
README = (SESSIONS / "README.md").read_text()
EXAMPLE = re.search(r"```pkt\n(.*?)```", README, re.S)[1]


@pytest.mark.parametrize("family", [4, 6])
def test_the_example_passes(family):
    Script(EXAMPLE, family).run()


def test_the_example_would_fail():
    with pytest.raises(Failed, match="nothing was sent"):
        Script(EXAMPLE.replace("delivered 500", "").replace("301:501(200)", "301:500(199)")).run()


def test_every_word_of_a_script_is_listed():
    listed = re.findall(r"^\| `\* (\w+)", README, re.M)
    words = [name.removeprefix("star_") for name in dir(Script) if name.startswith("star_")]
    assert sorted(listed) == sorted(words)


def test_every_directory_is_listed():
    listed = re.findall(r"`(\w+)`", "\n".join(README.partition("| directory ")[2].splitlines()))
    assert sorted(set(listed) - {"directory"}) == sorted(
        {path.parent.name for path in SESSIONS.glob("*/*.pkt")}
    )


def test_files_and_lists_it_names_are_there():
    for name in re.findall(r"`([\w/]+\.(?:py|c))`", README):
        places = [
            SESSIONS / name,
            SESSIONS.parents[1] / name,
            SESSIONS.parents[1] / "pycopy/session" / name,
        ]
        assert any(place.exists() for place in places), name
    conformance = (SESSIONS.parent / "bpf/test_conformance.py").read_text()
    for name in ("ALONE", "ONLY_SENT", "test_script_while_sessions_change_hands"):
        assert name in README and name in conformance
