"""pycopy: live TCP traffic of an online server, lived again against a target server."""

__version__ = "0.1.0"
