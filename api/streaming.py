"""Server-sent events, and work that ends when its client hangs up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.body import json_response
from api.errors import ApiError, ClientDisconnected, openai_error, to_api_error
from engine.errors import EngineError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


_encoder = msgspec.json.Encoder()


def event(chunk: msgspec.Struct | dict[str, Any], name: str | None = None) -> bytes:
    """`chunk` as one server-sent event, of a type that is named or not."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + _encoder.encode(chunk) + b"\n\n"


class TextEvents:
    """Events that differ in one text: what stands around that is written once.

    Args:
        example: One of them, its text empty.
        member: The text's name in JSON; no other member that has it is an empty text.
    """

    def __init__(self, example: bytes, member: str) -> None:
        name = _encoder.encode(member) + b":"
        # It stands in no text: quotes are escaped there.
        before, self._after = example.split(name + b'""')
        self._before = before + name

    def event(self, text: str) -> bytes:
        """The one with this text."""
        return b"".join((self._before, _encoder.encode(text), self._after))


def _openai_error_event(error: ApiError) -> bytes:
    return event(openai_error(error))


@dataclass(frozen=True, slots=True)
class StreamEnds:
    """How the streams of an endpoint end.

    Attributes:
        error: The last event of one that failed.
        done: What follows the last event of each.
    """

    error: Callable[[ApiError], bytes] = _openai_error_event
    done: bytes = b"data: [DONE]\n\n"


OPENAI_ENDS = StreamEnds()
"""As completions and chats end."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ClientDisconnected: The client has gone.
    """
    working = asyncio.current_task()
    assert working is not None
    has_gone = False

    async def watch() -> None:
        nonlocal has_gone
        # A connection that cannot be read is one that nobody reads from either.
        with suppress(Exception):
            while (await receive())["type"] != "http.disconnect":
                pass
        has_gone = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        # Another may have cancelled it, too.
        if has_gone and working.uncancel() == 0:
            raise ClientDisconnected from None
        raise
    finally:
        watching.cancel()


async def whole_answer(
    receive: Receive, work: Coroutine[Any, Any, msgspec.Struct], headers: dict[str, str]
) -> Response:
    """Answers with what `work` makes, in one piece.

    Raises:
        ClientDisconnected: The client hung up before.
    """
    return json_response(await until_disconnect(receive, work), headers)


async def event_stream(
    receive: Receive,
    events: AsyncGenerator[bytes, None],
    headers: Mapping[str, str],
    ends: StreamEnds = OPENAI_ENDS,
) -> Response:
    """Answers with `events`, and ends as the endpoint's clients expect.

    Waits for the first event, so that what fails before it is an ordinary HTTP error: raised here.
    """
    try:
        first = await until_disconnect(receive, _next(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, headers, ends)


async def _next(items: AsyncGenerator[Result, None]) -> Result:
    return await anext(items)


async def with_beats(
    items: AsyncGenerator[Result, None], seconds: float
) -> AsyncGenerator[Result | None, None]:
    """The items as they come, and None every so many seconds: a stream that waits for one says that it lives."""
    coming: asyncio.Task[Result] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.create_task(_next(items))
            await asyncio.wait({coming}, timeout=seconds)
            if not coming.done():
                yield None
                continue
            done, coming = coming, None
            try:
                item = done.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await items.aclose()


class EventStream(Response):
    """A response of server-sent events; closes `events` at the end or as soon as the client hangs up."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        ends: StreamEnds,
    ) -> None:
        self.first = first
        self.ends = ends
        self.events = events
        self.status_code = 200
        self.background = None
        # The second header keeps nginx from collecting the events into larger pieces.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            with suppress(ClientDisconnected):
                await until_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.first, "more_body": True})
        last = self.ends.done
        while True:
            try:
                data = await anext(self.events)
            except StopAsyncIteration:
                break
            except Exception as error:
                if not isinstance(error, (ApiError, EngineError)):
                    logger.exception("a stream failed")
                last = self.ends.error(to_api_error(error)) + last
                break
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": last, "more_body": False})
