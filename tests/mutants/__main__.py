"""Changes the rules in C in one place at a time, and says which changes no test notices.

    sudo python3 -m tests.mutants --list
    sudo python3 -m tests.mutants --sample 20
    sudo python3 -m tests.mutants --minutes 480
    sudo python3 -m tests.mutants --only session.h:2          # lines that begin with 2

What mutmut is for pycopy/session. Each change is compiled into the objects as ever and run
against both executors' scripts, their random conversations, and what else tests/bpf has for the
fast path, up to the first failure: half a minute for one that is noticed early, two for one that
is not. So a run can be ended at any time and goes on where it was (``--state``); ``--again`` tries
anew what had survived. Survivors that are no mistake, since nobody could tell the difference, are
named with the reason in equivalent.toml. The status is 1 if any other is left.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from tests.mutants.operators import Mutant, mutants_of
from tests.mutants.trial import ROOT, Outcome, Workshop

#: Files of bpf/ with rules that the engine has as well, and what carries them out. Some may not
#: be there: a file is split now and then.
RULES = (
    "session.h", "stream.h", "arrival.h", "generated.h", "fastpath.[ch]", "open.h", "keep.h",
    "pump.h", "counts.h", "record.h", "emit.h",
)  # fmt: skip

EQUIVALENT = Path(__file__).with_name("equivalent.toml")


def all_mutants() -> list[Mutant]:
    """Of all files of rules, in an order by chance that is always the same: any beginning of it is
    a sample."""
    files = sorted({path for pattern in RULES for path in (ROOT / "bpf").glob(pattern)})
    found = [each for path in files for each in mutants_of(path.name, path.read_text())]
    return sorted(found, key=lambda each: each.key)


def equivalents(mutants: list[Mutant]) -> dict[str, str]:
    """{key: why nobody could tell the difference}; an entry for what is not there is an error."""
    reasons = {}
    for entry in tomllib.loads(EQUIVALENT.read_text()).get("survivor", ()):
        said = entry["file"], entry["line"], entry["old"], entry["new"], entry.get("number", 0)
        keys = [each.key for each in mutants if _said(each) == said]
        if not keys or not entry["why"]:
            raise SystemExit(f"{EQUIVALENT.name}: there is no such change (any more): {said}")
        reasons.update(dict.fromkeys(keys, entry["why"]))
    return reasons


def _said(mutant: Mutant) -> tuple[str, str, str, str, int]:
    old, new = (" ".join(each.split()) for each in (mutant.old, mutant.new))
    return mutant.file, mutant.context, old, new, mutant.number


class State:
    """Results so far, a line each: whoever is killed while writing loses one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: dict[str, Outcome] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                said = json.loads(line)
                self.results[said["key"]] = Outcome(said["outcome"])
            except ValueError:
                continue

    def put(self, mutant: Mutant, outcome: Outcome, words: str) -> None:
        self.results[mutant.key] = outcome
        said = {"key": mutant.key, "outcome": outcome.value, "by": words, "what": str(mutant)}
        with open(self._path, "a") as file:
            file.write(json.dumps(said) + "\n")


def report(mutants: list[Mutant], state: State, reasons: dict[str, str]) -> int:
    """Print the score and the survivors: how many of them nobody has given a reason for."""
    tried = [(each, state.results[each.key]) for each in mutants if each.key in state.results]
    by_outcome = {
        outcome: [mutant for mutant, its in tried if its is outcome] for outcome in Outcome
    }
    survivors = by_outcome[Outcome.SURVIVED]
    unexplained = [each for each in survivors if each.key not in reasons]
    for each in sorted(survivors):
        print(f"survived: {each}")
        print(f"    {reasons.get(each.key, 'NO REASON GIVEN')}")
    real = sum(outcome.counts for _, outcome in tried) - len(survivors) + len(unexplained)
    noticed = sum(outcome.was_noticed for _, outcome in tried)
    print(", ".join(f"{outcome.value} {len(found)}" for outcome, found in by_outcome.items()))
    print(
        f"{len(tried)} of {len(mutants)} changes tried; {noticed} of {real} noticed"
        + (f" ({100 * noticed / real:.1f} %)" if real else "")
        + f", {len(survivors) - len(unexplained)} that nobody could notice"
    )
    return len(unexplained)


def chosen(mutants: list[Mutant], arguments: argparse.Namespace, state: State) -> list[Mutant]:
    """What is to be tried now."""
    found = mutants
    if arguments.only:
        found = [each for each in found if f"{each.file}:{each.line}".startswith(arguments.only)]
    if arguments.sample:
        found = random.Random(arguments.seed).sample(found, min(arguments.sample, len(found)))
    if arguments.again:
        return [each for each in found if state.results.get(each.key) is Outcome.SURVIVED]
    return [each for each in found if each.key not in state.results]


def try_all(mutants: list[Mutant], state: State, minutes: float, unchecked: bool) -> None:
    """Try one after the other, and begin none when the time is over."""
    until_s = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="pycopy-mutants-") as directory:
        workshop = Workshop(Path(directory))
        if not unchecked and (failed := workshop.try_nothing()):
            raise SystemExit(f"the tests fail with nothing changed: {failed}")
        for number, mutant in enumerate(mutants, 1):
            if time.monotonic() > until_s:
                print(f"the time is over; {len(mutants) - number + 1} are left")
                return
            outcome, words = workshop.try_one(mutant)
            state.put(mutant, outcome, words)
            print(f"{number}/{len(mutants)} {outcome.value}: {mutant} {words}", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print all changes and try none")
    parser.add_argument("--only", metavar="FILE[:LINE]", help="those whose place begins with it")
    parser.add_argument("--sample", type=int, metavar="N", help="so many, by chance")
    parser.add_argument("--seed", type=int, default=1, help="of the chance")
    parser.add_argument("--minutes", type=float, default=60, help="begin none after (60)")
    parser.add_argument("--again", action="store_true", help="only what has survived")
    parser.add_argument(
        "--unchecked", action="store_true", help="do not run the tests with nothing changed first"
    )
    parser.add_argument(
        "--state", type=Path, default=Path("mutants.jsonl"), help="results so far (mutants.jsonl)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    mutants = all_mutants()
    reasons = equivalents(mutants)
    if arguments.list:
        for each in sorted(mutants):
            print(f"{each.key} {each}")
        print(f"{len(mutants)} changes")
        return 0
    if os.geteuid() != 0:
        raise SystemExit("programs are loaded into the kernel: run it as root")
    state = State(arguments.state)
    try_all(chosen(mutants, arguments, state), state, arguments.minutes, arguments.unchecked)
    return 1 if report(mutants, state, reasons) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("ended; the next run goes on from here")
