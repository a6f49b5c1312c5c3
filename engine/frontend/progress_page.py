"""A page of memory on which the engine's process says what it is at: it can be read when that process is no more."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from pathlib import Path

_SIZE = 2**17
_LENGTH = struct.Struct("<q")


class ProgressPage:
    """The ids of the requests in the step under way.

    One process writes and another reads. Their number of bytes stands before them, and is zero while they change.

    Args:
        path: A file, which both processes map, and nobody needs afterwards.
        creates: Whether to make it.
    """

    def __init__(self, path: Path, creates: bool = False) -> None:
        with path.open("w+b" if creates else "r+b") as file:
            if creates:
                file.truncate(_SIZE)
            self._memory = mmap.mmap(file.fileno(), _SIZE)
        self._written: list[str] = []
        self._last: frozenset[str] | None = None

    def write(self, request_ids: Iterable[str]) -> None:
        """Says which requests the step is of; those that do not fit are left out."""
        named = list(request_ids)
        if named == self._written:
            return
        text = "\n".join(named).encode()[: _SIZE - _LENGTH.size]
        _LENGTH.pack_into(self._memory, 0, 0)
        self._memory[_LENGTH.size : _LENGTH.size + len(text)] = text
        _LENGTH.pack_into(self._memory, 0, len(text))
        self._written = named

    def read(self) -> frozenset[str]:
        """What was written last; nothing if that was cut off."""
        if self._last is not None:
            return self._last
        (length,) = _LENGTH.unpack_from(self._memory, 0)
        return frozenset(
            self._memory[_LENGTH.size : _LENGTH.size + length].decode(errors="replace").split("\n")
        )

    def close(self) -> None:
        """Lets go of the memory; what was written last can still be read. May be called twice."""
        self._last = self.read()
        self._memory.close()
