"""Errors that reach the user: one sentence of cause, one of cure, and the exit status.

Exit statuses (also in ``pycopy --help``): 0 done, 1 failed at run time, 2 usage,
3 host unfit, 4 refused by a safety guard, 130 interrupted before it was ready, or by a
second signal.
"""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNFIT = 3
EXIT_REFUSED = 4
EXIT_INTERRUPTED = 130


class PycopyError(Exception):
    """Something failed at run time; ``cause`` says what, ``cure`` what to do about it."""

    exit_status = EXIT_FAILED

    def __init__(self, cause: str, cure: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.cause}\n  {self.cure}" if self.cure else self.cause


class PeerError(PycopyError):
    """Another host does not do its part: nothing that could be tried differently here."""


class UsageError(PycopyError):
    """The command line asks for something that has no meaning."""

    exit_status = EXIT_USAGE


class HostUnfit(PycopyError):
    """This host lacks something pycopy needs: a privilege, a package, a kernel feature."""

    exit_status = EXIT_UNFIT


class Refused(PycopyError):
    """A safety guard said no; the cure says what to type to overrule it."""

    exit_status = EXIT_REFUSED
