"""The command, installed or as ``python3 -m pycopy``: what goes wrong on the way to cli.py.

Importing takes files, memory and the packages of the distribution; where a host has too
little of them, its user is told so, as of any other error.

Tests: tests/unit/test_tight_hosts.py
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself would take a file, and memory
    from typing import NoReturn


def script() -> "NoReturn":
    """Entry point of the installed command."""
    try:
        from pycopy import cli, errors
    except KeyboardInterrupt:
        os._exit(130)
    except (ImportError, OSError, MemoryError, SystemError) as error:
        _cannot_start(error)
    try:
        cli.script()
    except Exception as error:
        known = errors.explain(error)
        if known is None:
            raise
        _end(known.cause, known.cure, known.exit_status)


def _cannot_start(error: Exception) -> "NoReturn":
    try:
        from pycopy.errors import EXIT_UNFIT, explain

        known = explain(error)
        assert known is not None
    except (ImportError, OSError, MemoryError, SystemError):
        _end(f"cannot start: {error!r}", "see ulimit -a: memory and open files may be short", 3)
    _end(f"cannot start: {known.cause}", known.cure, EXIT_UNFIT)


def _end(cause: str, cure: str, status: int) -> "NoReturn":
    """Without what an exit in order would still need."""
    try:  # noqa: SIM105 - nothing more is imported now
        os.write(2, f"pycopy: error: {cause}\n  {cure}\n".encode(errors="replace"))
    except OSError:
        pass  # nobody listens; the exit status says it
    os._exit(status)


if __name__ == "__main__":
    script()
