"""C text that only a test needs, with maps as bcc declares them, compiled and loaded by bcc."""

import ctypes
import os
import warnings
from pathlib import Path

from pycopy.kernel.module import Map
from pycopy.kernel.objects import bpf_dir


class Loaded:
    """What pycopy.loader.Module is for pycopy's own programs."""

    def __init__(self, name, hook_xdp, program_fd, map_fds):
        self.program_name, self.hook_xdp = name, hook_xdp
        self.program_fd = program_fd
        self.program_fds = {name: program_fd}
        self.maps = {each: Map(fd) for each, fd in map_fds.items()}

    def close(self):
        for fd in (self.program_fd, *(each.fd for each in self.maps.values())):
            os.close(fd)
        self.maps = {}
        self.program_fd = -1


def load(source, *, xdp=False, name="", **defines):
    """Compile a file that may include bpf/'s headers, load its function ``pycopy_<name>``."""
    os.environ["BCC_KERNEL_SOURCE"] = str(bpf_dir() / "stub")
    import bcc

    source = Path(source)
    name = name or f"pycopy_{source.stem}"
    flags = [f"-D{macro}={value}" for macro, value in defines.items()]
    flags += ["-I", str(bpf_dir()), f"-DPYCOPY_HOOK_XDP={int(xdp)}"]
    if "PYCOPY_L2_BYTES" not in defines:
        flags.append("-DPYCOPY_L2_BYTES=14")
    text = '#include "hook.h"\n' + source.read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of bcc's, about text and bytes
        return _load(bcc, bcc.BPF(text=text, cflags=flags), name, xdp)


def _load(bcc, module, name, xdp):
    try:
        function = module.load_func(name, bcc.BPF.XDP if xdp else bcc.BPF.SCHED_CLS)
        names = _map_names(bcc, module)
        fds = {each: os.dup(bcc.lib.bpf_table_fd(module.module, each.encode())) for each in names}
        return Loaded(name, xdp, os.dup(function.fd), fds)
    finally:
        module.cleanup()


def _map_names(bcc, module):
    bcc.lib.bpf_table_name.restype = ctypes.c_char_p
    bcc.lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    count = bcc.lib.bpf_num_tables(module.module)
    return [bcc.lib.bpf_table_name(module.module, index).decode() for index in range(count)]
