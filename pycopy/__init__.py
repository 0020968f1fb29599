"""pycopy: live TCP traffic of an online server, replayed against a target server."""

__version__ = "0.1.0"
