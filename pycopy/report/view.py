"""What the user sees of a running program: live view, interval lines, the final summary.

Only reads: everything comes from a ``snapshot()`` of the ledger, any mapping of section to
counter to value, drawn in a thread of its own. A section called ``familiar`` holds tcpcopy's
names and is written the way tcpcopy writes them; ``balanced`` is a verdict wherever it stands.
JSON goes to stdout, text to stderr, and neither ever waits for its reader (messages.py).
rich is imported only when there is a terminal to draw on.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from pycopy.errors import explain
from pycopy.process import console
from pycopy.report.picture import BALANCED, FAMILIAR, Snapshot, Value, familiar_line, picture

if TYPE_CHECKING:
    from rich.text import Text

_REDRAW_S = 0.25
#: Rates are means over this many redraws.
_RATE_REDRAWS = 8


class View:
    """``start()`` once the program runs, ``stop()`` before it ends, then ``summary()``."""

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        interval_s: float,
        quiet: bool = False,
        json: bool = False,
        title: str = "pycopy",
    ) -> None:
        """``title`` says what is running, on the live view's first line."""
        self._snapshot = snapshot
        self._interval_s = interval_s
        self._quiet = quiet
        self._json = json
        self._title = title
        self._started = time.monotonic()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to show, from a thread of its own; with ``quiet`` nothing happens."""
        if self._quiet:
            return
        if self._json:
            body = self._json_lines
        elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            body = self._live
        else:
            body = self._lines
        # A daemon thread: it never keeps the process alive.
        thread = threading.Thread(target=self._guard, args=(body,), name="view", daemon=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            console.say("nothing is shown while it runs: the system starts no further thread")
            return
        self._thread = thread

    def stop(self) -> None:
        """Show nothing more; waits 2 s at most for the thread's last line."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
            self._thread = None

    def summary(self) -> None:
        """Everything, once and now; does not wait until it is written."""
        console.put(self.text(), to_stdout=self._json)

    def text(self) -> str:
        """The summary: text, or one JSON object on one line."""
        snapshot = self._snapshot()
        return self._json_line("summary", snapshot) if self._json else summary_text(snapshot)

    def _guard(self, body: Callable[[], None]) -> None:
        # The terminal may be gone: then nobody is looking any more.
        with contextlib.suppress(OSError, ValueError, MemoryError):
            try:
                body()
            except ImportError as error:
                missing = explain(error)
                console.say(f"no live view: {missing.cause if missing else error}")
                self._lines()

    def _ticks(self, period_s: float) -> Iterator[Snapshot]:
        while not self._stopping.wait(period_s):
            try:
                yield self._snapshot()
            except RuntimeError:
                continue  # a dictionary grew while it was being copied: look again next time

    def _lines(self) -> None:
        for snapshot in self._ticks(self._interval_s):
            console.say(f"{_utc_now()} {interval_text(snapshot)}")

    def _json_lines(self) -> None:
        for snapshot in self._ticks(self._interval_s):
            console.put(self._json_line("interval", snapshot), to_stdout=True)

    def _json_line(self, event: str, snapshot: Snapshot) -> str:
        line = {
            "event": event,
            "time": _utc_now(),
            "elapsed_s": round(time.monotonic() - self._started, 3),
            BALANCED: balanced(snapshot),
            "ledger": snapshot,
        }
        return json.dumps(line) + "\n"

    def _live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        history: deque[tuple[float, Snapshot]] = deque(maxlen=_RATE_REDRAWS + 1)
        ticks = self._ticks(_REDRAW_S)
        resized = True
        while resized:
            resized = False
            size = console.size
            with Live(
                console=console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            ) as live:
                # A hidden cursor would stay hidden after kill -9.
                console.show_cursor(True)
                for snapshot in ticks:
                    if console.size != size:
                        resized = True
                        break
                    history.append((time.monotonic(), snapshot))
                    live.update(self._picture(history, size.width, size.height), refresh=True)
                if resized:
                    live.update("")
            if resized:
                console.clear()  # a terminal folds old lines in its own way

    def _picture(self, history: deque[tuple[float, Snapshot]], columns: int, rows: int) -> "Text":
        from rich.text import Text

        then_s, before = history[0]
        now_s, now = history[-1]
        # One row less, for the cursor below: what scrolls away could not be cleared.
        lines = picture(
            self._title, now_s - self._started, now, before, now_s - then_s, columns - 1, rows - 1
        )
        # Plain padded text: rich's tables cost several times more per redraw.
        return Text("\n", no_wrap=True, overflow="crop").join(
            Text(text, style=style) for text, style in lines
        )


def balanced(snapshot: Snapshot) -> bool | None:
    """The verdict over all sections; None where no section has one."""
    verdicts = [_is_yes(section[BALANCED]) for section in snapshot.values() if BALANCED in section]
    return all(verdicts) if verdicts else None


def interval_text(snapshot: Snapshot) -> str:
    """One line: tcpcopy's names where the snapshot has them, else all that is not zero."""
    if FAMILIAR in snapshot:
        return familiar_line(snapshot)
    parts = []
    for name, section in snapshot.items():
        shown = ", ".join(f"{key} {text}" for key, text in _shown(section))
        if shown:
            parts.append(f"{name}: {shown}")
    return "; ".join(parts) or "nothing yet"


def summary_text(snapshot: Snapshot) -> str:
    """The snapshot as text: sections in their order, what is zero left out, then the balance."""
    lines = []
    for name, section in snapshot.items():
        if name == FAMILIAR:
            shown = _folded(_familiar(section))
        else:
            shown = [f"  {key:<36}{text:>14}" for key, text in _shown(section)]
        if shown:
            lines += [f"{name}:", *shown]
    verdict = balanced(snapshot)
    if verdict is not None:
        lines.append(f"ledger balanced: {_verdict(verdict)}")
    return "".join(f"{line}\n" for line in lines)


def _familiar(section: Mapping[str, Value]) -> list[str]:
    return [f"{key}:{_text(value)}" for key, value in section.items()]


def _folded(items: list[str]) -> list[str]:
    """Comma separated, under 80 columns, no item torn apart."""
    lines = ["  "]
    for number, item in enumerate(items, 1):
        word = item if number == len(items) else f"{item}, "
        if len(lines[-1] + word.rstrip()) > 79:
            lines.append("  ")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _shown(section: Mapping[str, Value]) -> Iterator[tuple[str, str]]:
    """Names and values worth a line: counters at zero are not."""
    for key, value in section.items():
        if key == BALANCED:
            yield key, _verdict(_is_yes(value))
        elif value != 0:
            yield key, _text(value)


def _text(value: Value) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _is_yes(value: Value) -> bool:
    return value.lower() in ("yes", "true") if isinstance(value, str) else bool(value)


def _verdict(yes: bool) -> str:
    return "yes" if yes else "NO"


def _utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
