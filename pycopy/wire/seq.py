"""Sequence number arithmetic modulo 2^32 (RFC 9293 section 3.4, RFC 1982).

Pure integers, for TCP sequence numbers and for timestamps alike. Knows nothing of
segments. Order is only meaningful between numbers less than 2^31 apart; exactly 2^31
apart RFC 1982 leaves it undefined, and :func:`diff` calls ``a`` the earlier one.
"""

MASK = 0xFFFFFFFF
_HALF = 0x80000000


def diff(a: int, b: int) -> int:
    """Signed distance ``a - b``, in -2^31 .. 2^31-1."""
    return ((a - b + _HALF) & MASK) - _HALF


def lt(a: int, b: int) -> bool:
    """Whether ``a`` comes before ``b``."""
    return (a - b) & MASK >= _HALF
