"""Which of the two a run has, by -s: the driver knows them by base.py only.

Tests: tests/unit/test_replay.py
"""

from pycopy.command.config import ReplayConfig
from pycopy.host.nexthop import NextHops
from pycopy.process.loop import Loop
from pycopy.responses.base import Kernel, Listener, Responses, Targets
from pycopy.responses.elsewhere import ResponsesElsewhere, why_not_in_kernel
from pycopy.responses.here import ResponsesHere, take_ports
from pycopy.tap import Transport


class Choice:
    """Made once a run; the responses may be made twice, with a kernel's sessions and without."""

    def __init__(
        self, config: ReplayConfig, listener: Listener, loop: Loop, hops: NextHops,
        targets: Targets,
    ) -> None:  # fmt: skip
        """Raises PycopyError where no ports are left to copy from."""
        self._config = config
        self._listener = listener
        self._loop = loop
        self._hops = hops
        self._targets = targets
        self._ports = None if config.intercepts else take_ports(config)

    def why_no_fastpath(self) -> str:
        """Why the kernel can keep no sessions in this run; empty: it can."""
        config = self._config
        if not config.fastpath:
            return "--no-fastpath"
        if config.hook == "xdp":
            return "the XDP hook cannot send copies"
        return why_not_in_kernel(config, self._targets) if config.intercepts else ""

    def make(self, transport: Transport, kernel: Kernel | None) -> Responses:
        """``kernel``: which keeps sessions as well. Raises PycopyError, OSError."""
        config, listener, loop, targets = self._config, self._listener, self._loop, self._targets
        if self._ports is None:
            return ResponsesElsewhere(config, listener, loop, targets, transport, kernel)
        return ResponsesHere(
            config, listener, loop, self._hops, targets, self._ports, transport, kernel
        )
