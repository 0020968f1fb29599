"""Connections that are over and not forgotten yet: what the target still says of one is late."""


class Leaving:
    """Keys in two generations: each stays from one call of :meth:`forget` to the next but one."""

    def __init__(self) -> None:
        self._younger: dict[bytes, None] = {}
        self._older: dict[bytes, None] = {}

    def add(self, key: bytes) -> None:
        """The connection ``key`` is over."""
        self._older.pop(key, None)
        self._younger[key] = None

    def withdraw(self, key: bytes) -> bool:
        """It has begun anew; False if it is none of these."""
        for generation in (self._younger, self._older):
            if key in generation:
                del generation[key]
                return True
        return False

    def forget(self) -> list[bytes]:
        """Call it at a steady pace: what has been here since before the last call, now gone."""
        gone, self._older, self._younger = self._older, self._younger, {}
        return list(gone)
