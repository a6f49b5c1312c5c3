"""What HTTP's own rules ask of every answer, before a path is looked at (RFC 9110)."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10
"""A longer head is passed on as it came."""

_END_OF_HEAD = b"\r\n\r\n"
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class HttpProtocol(HttpToolsProtocol):
    """Ignores requests to upgrade, as a server may (section 7.8).

    httptools takes what follows such a request's head for the other protocol's, so that its body is lost; every
    client of the Java Development Kit asks for HTTP/2 with its first request.
    """

    _is_in_head = True
    _held = b""

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            data = self._held + data
            end = data.find(_END_OF_HEAD)
            if end < 0 and len(data) <= MAX_HEAD_BYTES:
                self._held = data
                return
            self._held = b""
            data = _UPGRADE.sub(b"", data[:end]) + data[end:] if end >= 0 else data
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head = True
        super().on_message_complete()


class HeadMiddleware:
    """Answers HEAD as GET, without the content (section 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


class RequestIdMiddleware:
    """Gives every answer an X-Request-Id: the client's own, where it sent one of up to 128 visible characters."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                if _REQUEST_ID.fullmatch(given):
                    headers["x-request-id"] = given
                elif "x-request-id" not in headers:
                    headers["x-request-id"] = uuid.uuid4().hex
            await send(message)

        await self._app(scope, receive, send_with_id)
