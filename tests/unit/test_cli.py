"""The command line: tcpcopy's own lines are understood; mistakes have one clear answer."""

import ipaddress
import os
import re
import subprocess
import sys

import pytest

from pycopy import cli
from pycopy.command import options
from pycopy.command.config import InterceptConfig, ReplayConfig, default_ring_bytes
from pycopy.errors import UsageError
from pycopy.wire.address import map_address

COMMANDS = list(options.COMMANDS)


def pycopy(*argv, **run_options):
    return subprocess.run(
        [sys.executable, "-m", "pycopy", *argv],
        capture_output=True,
        text=True,
        timeout=30,
        **run_options,
    )


def replay(line):
    return cli.replay_config(line.split())


def mapped(text):
    return map_address(ipaddress.ip_address(text))


# The lines of the seeds, as typed there.


def test_replay_as_in_the_seeds():
    config = replay("-x 80-61.135.233.160:8080 -s 61.135.233.161 -c 62.135.200.x")
    (service,) = config.services
    assert (service.online_addr, service.online_port) == (None, 80)
    assert (service.target_addr, service.target_port) == (mapped("61.135.233.160"), 8080)
    assert config.intercepts == [("61.135.233.161", 36524)]
    assert config.client_pool == [ipaddress.ip_network("62.135.200.0/24")]
    assert config.wait_for_response
    assert not config.daemon


def test_old_form_as_in_the_seeds():
    for line in (
        "1.2.3.13:1.2.3.14 12321 1.2.3.148 12321 -d",
        "-d 1.2.3.13:1.2.3.14 12321 1.2.3.148 12321",
        "1.2.3.13:1.2.3.14 12321 -d -- 1.2.3.148 12321",
    ):
        config = replay(line)
        assert [service.online_addr for service in config.services] == [
            mapped("1.2.3.13"),
            mapped("1.2.3.14"),
        ]
        assert config.intercepts == []
        assert config.daemon
    assert replay("1.2.3.13 80 1.2.3.148 80 -s 1.2.3.148").intercepts == [("1.2.3.148", 36524)]


def test_intercept_as_in_the_seeds():
    config = cli.intercept_config(["-i", "eth0", "-F", "tcp and src port 8080", "-d"])
    assert config.interfaces == ["eth0"]
    assert config.filter == "tcp and src port 8080"
    assert (config.placement, config.bind, config.port) == ("auto", "", 36524)
    assert config.daemon
    assert config.log_path == "/var/log/pycopy-intercept.log"


def test_every_letter_of_replay():
    config = replay(
        "-x 80-10.0.0.2:81 -s 10.0.0.3,10.0.0.4:7 -p 9 -c 62.135.200.x,10.9.0.0/16 -i eth0,eth1"
        " -F tcp -W -O -r 10% -g -t 30 -k 40 -m 100 -M 1400 -L -d -l /tmp/l -P /tmp/p"
        " --hook xdp --json --interval 2 -q --allow-public-target --ring 1M --max-sessions 99"
    )
    assert config.intercepts == [("10.0.0.3", 9), ("10.0.0.4", 7)]
    assert len(config.client_pool) == 2
    assert config.interfaces == ["eth0", "eth1"]
    assert (config.filter, config.hook) == ("tcp", "xdp")
    assert not config.wait_for_response
    assert config.only_full_sessions
    assert (config.sample_percent, config.ramp) == (10, True)
    assert (config.response_idle_s, config.session_idle_s) == (30, 40)
    assert (config.memory_mb, config.max_sessions, config.mtu) == (100, 99, 1400)
    assert (config.lonely, config.daemon, config.quiet, config.json) == (True,) * 4
    assert (config.log_path, config.pid_path, config.interval_s) == ("/tmp/l", "/tmp/p", 2.0)
    assert (config.allow_public_target, config.ring_bytes) == (True, 1 << 20)


def test_long_options_and_defaults():
    letters = replay("-x 80-10.0.0.2:81 -s 10.0.0.3 -W -t 30")
    long = replay("--copy=80-10.0.0.2:81 --intercept 10.0.0.3 --no-wait --response-timeout 30")
    assert letters == long
    assert letters.session_idle_s == 150  # -t plus 120, as ever
    config = replay("-x 80-10.0.0.2:81 --ports 20000-20999")
    assert config.self_ports == (20000, 20999)
    assert (config.response_idle_s, config.session_idle_s, config.sample_percent) == (600, 720, 100)


def test_every_letter_of_intercept():
    config = cli.intercept_config(
        "-i eth0 -F tcp -b fd00::1 -p 7 --at target --pass 10.1.0.x --pass 10.2.0.0/16,10.3.0.1"
        " -x 10.4.0.1,10.4.0.2 -l /tmp/l -P /tmp/p --json --interval 1 -q --ring 128K"
        " --hook xdp".split()
    )
    assert (config.bind, config.port, config.placement) == ("fd00::1", 7, "target")
    assert config.hook == "xdp" and cli.intercept_config(["-F", "tcp"]).hook == "tc"
    assert len(config.pass_nets) == 5
    assert (config.log_path, config.pid_path) == ("/tmp/l", "/tmp/p")
    assert (config.json, config.interval_s, config.quiet) == (True, 1.0, True)
    assert config.ring_bytes == 128 << 10


@pytest.mark.parametrize(
    ("line", "cause", "cure"),
    [
        ("", "-x is missing", "-x 80-10.0.0.2:8080"),
        ("-x 80-10.0.0.2:80 more", "unexpected argument: 'more'", "in one word"),
        ("-x 80-10.0.0.2:80 -F tcp and", "unexpected argument: 'and'", "quote an expression"),
        ("-x 80-10.0.0.2:80 --ports 80-2000", "ports below 1024", "20000-29999"),
        ("-x 8080-10.0.0.2:80 --ports 8000-8999", "contains 8080", "a range without it"),
        ("-x 80-10.0.0.2:80 -V", "unknown option -V", "did you mean -v?"),
        ("1.2.3.4 80 1.2.3.5", "unexpected argument: '1.2.3.4'", "exactly four words"),
        ("--copie 80-10.0.0.2:80", "unknown option --copie", "did you mean --copy?"),
        ("-x 80-10.0.0.2:80 --intercpt=1", "unknown option --intercpt", "--intercept?"),
        ("-x 80-10.0.0.2:80 -Z", "unknown option -Z", "--help"),
        ("-x", "expected one argument", "--help"),
        ("-x 80-10.0.0.2:80 -c 62.135.200.x", "-c has no meaning without -s", "add -s HOST"),
        ("-x 80-10.0.0.2:80 -p 7", "-p has no meaning without -s", "add -s HOST"),
        ("-x 80-10.0.0.2:80 -s 1.2.3.4 --ports 1-2", "no meaning with -s", "leave one"),
        ("-x 80-[fd00::2]:80 -s fd00::3 -c 62.135.200.x", "no IPv6 addresses", "of that family"),
        ("-x 80-10.0.0.2:80 -r 0", "from 1 to 100", "-r 1"),
        ("-x 80-10.0.0.2:80 -r 101", "from 1 to 100", "-r 100"),
        ("-x 80-10.0.0.2:80 -t -1", "from 1 to 86400", "-t 1"),
        ("-x 80-10.0.0.2:80 -M 100", "from 576 to 65535", "-M 576"),
        ("-x 80-10.0.0.2:80 --hook tcp", "'tcp' is not known", "did you mean tc?"),
    ],
)
def test_replay_usage_errors(line, cause, cure):
    with pytest.raises(UsageError) as caught:
        replay(line)
    assert cause in caught.value.cause
    assert cure in caught.value.cure


@pytest.mark.parametrize("letter", [row.letter for row in ReplayConfig.refused])
def test_letters_of_tcpcopy_that_are_not_taken_say_why(letter):
    for words in ([letter], [letter, "7"], [letter + "7"]):
        with pytest.raises(UsageError) as caught:
            cli.replay_config(["-x", "80-10.0.0.2:80", *words])
        assert caught.value.cause.startswith(f"{letter} (")
        assert caught.value.cure


@pytest.mark.parametrize("letter", [row.letter for row in InterceptConfig.refused])
def test_letters_of_intercept_that_are_not_taken_say_why(letter):
    with pytest.raises(UsageError) as caught:
        cli.intercept_config(["-F", "tcp", letter, "7"])
    assert caught.value.cause.startswith(f"{letter} (")
    assert caught.value.cure


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("", "-F is missing"),
        ("-F tcp -q 2048", "-q takes no number here: '2048'"),
        ("-F tcp and src port 80", "unexpected argument: 'and'"),
        ("-F tcp --at traget", "'traget' is not known"),  # codespell:ignore traget
        ("-F tcp --hook tcx", "'tcx' is not known"),
        ("-F tcp --pass 10.0.0.1/24", "beyond its prefix length"),
        ("-F tcp -p 0", "from 1 to 65535"),
        ("-F tcp -t 7", "unknown option -t"),
    ],
)
def test_intercept_usage_errors(line, cause):
    with pytest.raises(UsageError) as caught:
        cli.intercept_config(line.split())
    assert cause in caught.value.cause


def test_help_is_complete_and_fits_a_terminal():
    texts = {"": pycopy("--help")}
    texts |= {command: pycopy(command, "--help") for command in COMMANDS}
    for command, done in texts.items():
        assert (done.returncode, done.stderr) == (0, ""), command
        assert max(map(len, done.stdout.splitlines())) < 80, command
        assert "exit status:" in done.stdout or command == "lab"
        if command:
            shown = set(re.findall(r"--[a-z-]+", done.stdout))
            known = {
                name
                for action in options.parser(command)._actions
                for name in action.option_strings
                if name.startswith("--")
            }
            assert shown - {"--help"} == known - {"--help"}
    assert all(f"\n  {command}" in texts[""].stdout for command in COMMANDS)


def test_the_examples_in_the_help_parse():
    for text in (options._REPLAY_EPILOG, options._INTERCEPT_EPILOG, options.top_help()):
        examples = re.findall(r"pycopy (replay|intercept) (-[^-].*|\d.*)$", text, re.MULTILINE)
        assert examples
        for command, line in examples:
            words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line)]
            if command == "replay":
                assert cli.replay_config(words).services
            else:
                assert cli.intercept_config(words).filter


def test_no_arguments_is_the_help_and_a_usage_error():
    done = pycopy()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == options.top_help()


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["repaly"], 2, ["unknown command 'repaly'", "did you mean replay?"]),
        (["-x", "80-10.0.0.2:80"], 2, ["options follow the command"]),
        (["replay", "-x", "80-no-such-host.invalid:80"], 2, ["cannot resolve"]),
        (["replay", "-x", "80-10.255.0.2:80", "-i", "no-such-dev"], 2, ["no such network device"]),
        (["replay", "-x", "80-127.0.0.1:80"], 4, ["this host itself", "cannot be overruled"]),
        (["replay", "-x", "80-9.9.9.9:80"], 4, ["--allow-public-target"]),
        (["intercept", "-F", "tcp", "-i", "no-such-dev"], 2, ["no such network device"]),
        (["lab"], 2, ["the action is missing"]),
        (["lab", "ups"], 2, ["did you mean up?"]),
        (["lab", "up", "online"], 2, ["unexpected argument", "leave it out"]),
        (["lab", "--name", "../x", "up"], 2, ["cannot be the name of a lab"]),
        (["-V"], 2, ["did you mean -v?"]),
        (["help", "repaly"], 2, ["did you mean replay?"]),
        (["lab", "exec"], 2, ["which host?"]),
        (["lab", "exec", "online"], 2, ["which command?"]),
        (["lab", "shell", "online", "ls"], 2, ["takes no command"]),
        (["demo", "--family", "5"], 2, ["'5' is not known"]),
        (["demo", "--placement", "self,slef"], 2, ["did you mean self?"]),
        (["demo", "--requests", "7", "--connections", "11"], 2, ["more than --requests"]),
        (["detach", "-i", "no-such-dev"], 2, ["no such network device"]),
    ],
)
def test_errors_of_the_command(argv, status, words):
    done = pycopy(*argv)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("pycopy: error: ")
    assert len(done.stderr.splitlines()) == 2
    assert done.stderr.splitlines()[1].startswith("  ")
    for word in words:
        assert word in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 100
    assert not done.stderr.splitlines()[1][2].isupper()


@pytest.mark.parametrize(
    "argv",
    [
        ["replay", "-x", "80-10.255.0.2:80"],
        ["intercept", "-F", "tcp"],
        ["detach"],
        ["demo"],
        ["lab", "up"],
    ],
)
def test_without_privilege(argv):
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-m", "pycopy", *argv], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (3, "")
    in_lab = argv[0] in ("demo", "lab")
    assert ("needs root" if in_lab else "CAP_BPF missing") in done.stderr
    assert "sudo" in done.stderr
    assert ("systemd" in done.stderr) is not in_lab


def test_help_is_asked_for_in_two_ways():
    for command in COMMANDS:
        assert pycopy("help", command).stdout == pycopy(command, "--help").stdout != ""
    assert pycopy("help").stdout == pycopy("--help").stdout


def test_version():
    for argv in (["--version"], ["-v"], ["replay", "-v"], ["intercept", "--version"]):
        assert re.fullmatch(r"pycopy \d+\.\d+\.\d+\n", pycopy(*argv).stdout)


def test_a_closed_pipe_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    for argv in (["--help"], ["replay", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "pycopy", *argv],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (1, b"")
    os.close(write)


def test_interrupted_before_a_driver_runs(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "replay", interrupted)
    assert cli.main(["replay"]) == 130
    assert capsys.readouterr().err == "pycopy: interrupted\n"


def test_words_after_lab_exec_are_not_ours(monkeypatch):
    from pycopy import lab

    seen = []
    monkeypatch.setattr(lab, "command", lambda *arguments: seen.append(arguments) or 7)
    assert cli.main(["lab", "--name", "mine", "exec", "online", "--", "ip", "--json", "-h"]) == 7
    assert cli.main(["lab", "up"]) == 7
    assert cli.main(["lab", "shell", "target"]) == 7
    assert seen == [
        ("exec", "online", ["ip", "--json", "-h"], "mine"),
        ("up", None, [], "pycopy-lab"),
        ("shell", "target", [], "pycopy-lab"),
    ]


def test_workers():
    assert replay("-x 80-10.0.0.2:8080").workers == 1
    assert replay("-x 80-10.0.0.2:8080 --workers 1").memory_mb == 1024
    config = replay("-x 80-10.0.0.2:8080 --workers 30")
    assert (config.workers, config.memory_mb) == (30, 30 * 64)
    assert config.ring_bytes == default_ring_bytes(30)
    assert replay("-x 80-10.0.0.2:8080 --workers 30 --ring 1M").ring_bytes == 1 << 20
    assert replay("-x 80-10.0.0.2:8080 -s 10.0.0.3 --workers 64").workers == 64
    cpus = len(os.sched_getaffinity(0))
    assert replay("-x 80-10.0.0.2:8080 --workers auto").workers == min(cpus, 30)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("--workers 0", "from 1 to 30"),
        ("--workers 31", "from 1 to 30"),
        ("--workers 65 -s 10.0.0.3", "from 1 to 64"),
        ("--workers many", "--workers many"),
        ("--workers 2 --hook xdp", "one XDP program"),
        ("--workers 4 --max-sessions 3", "--max-sessions 3"),
        ("--workers 4 -m 255", "-m 255"),
    ],
)
def test_workers_that_cannot_be(words, cause):
    with pytest.raises(UsageError, match=re.escape(cause)):
        replay(f"-x 80-10.0.0.2:8080 {words}")
