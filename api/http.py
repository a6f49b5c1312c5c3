"""What HTTP's own rules ask of every answer, before a path is looked at (RFC 9110)."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What may stand in X-Request-Id."""


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
    """Gives every answer an X-Request-Id: the client's own, where it sent one of up to 128 visible characters.

    Request-Id says the same.
    """

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
                if REQUEST_ID.fullmatch(given):
                    headers["x-request-id"] = given
                elif "x-request-id" not in headers:
                    headers["x-request-id"] = uuid.uuid4().hex
                # As Anthropic's clients call it.
                headers["request-id"] = headers["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_with_id)
