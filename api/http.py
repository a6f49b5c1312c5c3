"""What HTTP's own rules ask of every answer, before a path is looked at (RFC 9110)."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.logs import begin_request, note_request

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What may stand in X-Request-Id."""

MAX_PATH = 256
"""Characters of a path that are logged."""


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

    Request-Id says the same, and so does every line of the log that is about the request; one is written as it ends.

    Args:
        quiet_paths: Whose answers are logged only where they are no success: others ask for them all the time.
    """

    def __init__(self, app: ASGIApp, quiet_paths: Collection[str] = ()) -> None:
        self._app, self._quiet_paths = app, frozenset(quiet_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        is_given = REQUEST_ID.fullmatch(given) is not None
        own = given if is_given else secrets.token_hex(16)
        begin_request(request_id=own)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                answer_id = headers.get("x-request-id")
                if answer_id is not None and not is_given:
                    note_request(request_id=answer_id)
                else:
                    headers["x-request-id"] = own
                    if answer_id is not None:
                        # By which traces call it.
                        note_request(answer_id=answer_id)
                # As Anthropic's clients call it.
                headers["request-id"] = headers["x-request-id"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            path = scope["path"]
            if path not in self._quiet_paths or not 200 <= status < 300:
                seconds = time.perf_counter() - began
                logger.info("%s %s %d %.3f s", scope["method"], path[:MAX_PATH], status, seconds)
