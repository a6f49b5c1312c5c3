"""Clients that do not read what they are sent: they hold a piece of an answer, and are hung up on after a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from api.connection import HttpProtocol


@dataclass(frozen=True, slots=True)
class SlowReaders:
    """What becomes of clients that do not read.

    Attributes:
        seconds: How long one may read nothing of what it was sent.
        on_drop: Is called when it is hung up on.
    """

    seconds: float
    on_drop: Callable[[], None]


class SlowReaderProtocol(HttpProtocol):
    """Hangs up on clients that do not read; no more than a piece of an answer is written while some is unread."""

    def __init__(self, *arguments: Any, readers: SlowReaders, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._readers = readers
        # How much was unread when that was last looked at, while it is.
        self._num_unread: int | None = None
        self._looking: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin_looking()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_looking()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._begin_looking()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_looking()

    def _begin_looking(self) -> None:
        # What was unread before is no measure: more has been written since.
        self._stop_looking()
        self._look()

    def _look(self) -> None:
        """Hangs up on a client that has read nothing since the last look."""
        before, self._num_unread = self._num_unread, self.transport.get_write_buffer_size()
        if not self._num_unread:
            self._stop_looking()
        elif before is not None and self._num_unread >= before:
            self._readers.on_drop()
            self.transport.abort()
        else:
            self._looking = self.loop.call_later(self._readers.seconds, self._look)

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self._num_unread = self._looking = None
