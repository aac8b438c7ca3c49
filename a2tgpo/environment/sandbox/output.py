"""Collect the output of a process in bounded memory: its beginning and its end."""

from __future__ import annotations

MAX_CHARACTER_BYTES = 4
CUT = "\n... (a part of the output is left out) ...\n"


class BoundedOutput:
    """Keeps the beginning and the end of a UTF-8 text of any length.

    Args:
        max_chars: largest number of characters of the text that are kept.
    """

    def __init__(self, max_chars: int):
        self._max_chars = max_chars
        self._max_bytes = max_chars * MAX_CHARACTER_BYTES
        self._head = bytearray()
        self._tail = bytearray()
        self._is_shortened = False

    def add(self, data: bytes) -> None:
        room = self._max_bytes - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > self._max_bytes:
            self._is_shortened = True
            del self._tail[: -self._max_bytes]

    def text(self) -> str:
        """Return the output. Invalid bytes become replacement characters, and a long output loses its middle."""
        whole = (bytes(self._head) + bytes(self._tail)).decode("utf-8", "replace")
        if not self._is_shortened and len(whole) <= self._max_chars:
            return whole
        half = self._max_chars // 2
        return f"{whole[:half]}{CUT}{whole[-half:]}"
