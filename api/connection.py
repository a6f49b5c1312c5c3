"""The server's side of a connection, which serves HTTP/1.1 and nothing else, and waits for nobody without end.

The parser takes heads, chunk sizes and trailers of any length, and copies a line that comes in pieces with each of
them. So bytes are counted before it gets them, and there is a time for each part of a request: whoever it is that
asks, and before a key is looked at.
"""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.errors import ApiError, error_shape
from api.limits import (
    BODY_SECONDS,
    HEAD_SECONDS,
    KEEP_ALIVE_SECONDS,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_PIPELINED,
)

CHUNK_OVERHEAD = 8
"""Bytes beside each byte of a body that do not count: a chunk of one has five."""

_END_OF_HEAD = b"\r\n\r\n"
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_BEGINNING = b"\r\nupgrade:"


class HttpProtocol(HttpToolsProtocol):
    """Ignores requests to upgrade, as a server may (RFC 9110, 7.8), and closes what is late or grows too long.

    httptools takes what follows an upgrade's head for the other protocol's, so that the body is lost; every client of
    the Java Development Kit asks for HTTP/2 with its first request.
    """

    _is_in_head = True
    _held = b""
    _overhead = 0
    """Bytes of this message so far that are not its content."""
    _behind_head = 0
    """How many bytes came with the end of the head."""
    _num_headers = 0
    _too_many = ""
    _timer: asyncio.TimerHandle | None = None
    url = b""
    _running: Any = None
    """The exchange that is under way, or was the last."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(KEEP_ALIVE_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._is_answering:
            # The request that is answered, which is not the latest where others wait for it.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._is_in_head:
            if not self._overhead:
                self._wait(HEAD_SECONDS)
            end = (self._held + data).find(_END_OF_HEAD)
            of_head = len(data) if end < 0 else max(0, end - len(self._held))
            self._overhead += of_head
            self._behind_head = len(data) - of_head
            if self._is_too_long():
                return
            data = self._without_upgrade(data)
        else:
            self._overhead += len(data)
        if data:
            super().data_received(data)
            self._is_too_long()

    def _is_too_long(self) -> bool:
        """Refuses a message that has more beside its content than may be."""
        if self._overhead > MAX_HEAD_BYTES:
            self._refuse(431, f"request line, headers and trailers have more than {MAX_HEAD_BYTES} bytes")
        return self._overhead > MAX_HEAD_BYTES

    def _without_upgrade(self, data: bytes) -> bytes:
        """What the parser gets of a head's bytes: not the line that asks to upgrade, nor yet what may become one."""
        data, self._held = self._held + data, b""
        end = data.find(_END_OF_HEAD)
        if end < 0:
            # The last line may be, or become, the one that is left out; or the head's end.
            start = max(data.rfind(b"\r"), 0)
            line = data[start:]
            if data.endswith(_END_OF_HEAD[:3]):
                start -= 2
            if _BEGINNING.startswith(line[: len(_BEGINNING)].lower()):
                data, self._held = data[:start], data[start:]
            end = len(data)
        return _UPGRADE.sub(b"", data[:end]) + data[end:]

    def on_message_begin(self) -> None:
        self._num_headers = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self._too_many = f"more than {MAX_PIPELINED} requests wait for the answer to one before them"
            raise ValueError(self._too_many)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            self._too_many = f"there are more than {MAX_HEADERS} headers"
            raise ValueError(self._too_many)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._overhead = self._behind_head
        super().on_headers_complete()
        self._wait_for_body()

    def on_body(self, body: bytes) -> None:
        self._overhead = max(0, self._overhead - CHUNK_OVERHEAD * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head = True
        self._overhead = self._behind_head = 0
        self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_in_head:
            self._wait_for_body()

    def send_400_response(self, msg: str) -> None:
        """What the parser cannot read, or may not."""
        if self._too_many:
            self._refuse(431, self._too_many)
        else:
            super().send_400_response(msg)

    def _wait_for_body(self) -> None:
        # A request that waits for the answer to another is not read on, which is no fault of its client.
        if self.cycle is self._running:
            self._wait(BODY_SECONDS)
        else:
            self._stop_waiting()

    def _wait(self, seconds: float) -> None:
        """Gives the client so much time for what is next."""
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, self._time_out, seconds)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self, seconds: float) -> None:
        if self.transport.is_closing():
            return
        if self._is_in_head and not self._overhead:
            self.transport.close()
        elif self._is_in_head and self._is_answering:
            # There is time: nothing is done with the next request before this one is answered.
            self._wait(seconds)
        else:
            part = "head" if self._is_in_head else "body"
            self._refuse(408, f"the request's {part} was not complete after {seconds:g} s")

    @property
    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _refuse(self, status: int, message: str) -> None:
        """Says why, unless an answer has begun or another is due before, and closes the connection."""
        if self.transport.is_closing():
            return
        if self._is_in_head:
            is_next = not self._is_answering
        else:
            is_next = self.cycle is self._running and not self.cycle.response_started
        if is_next:
            path = self.url.decode("latin-1").partition("?")[0]
            body = msgspec.json.encode(error_shape(path)(ApiError(status, message)))
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()
