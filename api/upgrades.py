"""The server's side of a connection, which serves HTTP/1.1 and nothing else."""

from __future__ import annotations

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_LINE_BYTES = 64 * 2**10
"""A longer line is passed on as it came."""

_END_OF_HEAD = b"\r\n\r\n"
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_BEGINNING = b"\r\nupgrade:"


class HttpProtocol(HttpToolsProtocol):
    """Ignores requests to upgrade, as a server may (RFC 9110, 7.8).

    httptools takes what follows such a request's head for the other protocol's, so that its body is lost; every
    client of the Java Development Kit asks for HTTP/2 with its first request.
    """

    _is_in_head = True
    _held = b""

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
