"""The server's side of a connection, which serves HTTP/1.1 and nothing else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_LINE_BYTES = 64 * 2**10
"""A longer line is passed on as it came."""

_END_OF_HEAD = b"\r\n\r\n"
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_BEGINNING = b"\r\nupgrade:"


@dataclass(frozen=True, slots=True)
class SlowReaders:
    """What becomes of clients that do not read.

    Attributes:
        seconds: How long one may read nothing of what it was sent.
        on_drop: Is called when it is hung up on.
    """

    seconds: float
    on_drop: Callable[[], None]


class HttpProtocol(HttpToolsProtocol):
    """Hangs up on clients that do not read: no more than a piece of an answer is written while some of it is unread.

    Ignores requests to upgrade, as a server may (RFC 9110, 7.8).

    httptools takes what follows such a request's head for the other protocol's, so that its body is lost; every
    client of the Java Development Kit asks for HTTP/2 with its first request.
    """

    _is_in_head = True
    _held = b""

    def __init__(self, *arguments: Any, readers: SlowReaders, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._readers = readers
        # How much was unread when that was last looked at, while it is.
        self._num_unread: int | None = None
        self._looking: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_looking()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._looking is None:
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_looking()

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

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            data, self._held = self._held + data, b""
            end = data.find(_END_OF_HEAD)
            if end < 0:
                # The last line may be, or become, the one that is left out; or the head's end.
                start = max(data.rfind(b"\r"), 0)
                line = data[start:]
                if data.endswith(_END_OF_HEAD[:3]):
                    start -= 2
                if _BEGINNING.startswith(line[: len(_BEGINNING)].lower()) and len(line) <= MAX_LINE_BYTES:
                    data, self._held = data[:start], data[start:]
                end = len(data)
            data = _UPGRADE.sub(b"", data[:end]) + data[end:]
        if data:
            super().data_received(data)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head = True
        super().on_message_complete()
