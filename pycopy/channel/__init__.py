"""The channel: responses from ``pycopy intercept`` to ``pycopy replay``, framed TCP, batched.

codec.py is sans-IO; server.py (with routes.py) is the intercept's end, client.py the replay's,
stream.py what both stand on.
"""

from pycopy.channel.client import Count, InterceptClient
from pycopy.channel.codec import Hello, Placement, ProtocolError, Range, Refuse, Relaying, Welcome
from pycopy.channel.server import ChannelServer, Fate, Refusal, Visit

__all__ = [
    "ChannelServer",
    "Count",
    "Fate",
    "Hello",
    "InterceptClient",
    "Placement",
    "ProtocolError",
    "Range",
    "Refusal",
    "Refuse",
    "Relaying",
    "Visit",
    "Welcome",
]
