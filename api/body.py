"""Reading a request's body and writing an answer's.

What is done with a body takes as long as it is long: decoding, checking, rendering, tokenizing. So it is done in a
thread, beside the event loop, which hands out the tokens of all streams; and of long bodies one at a time, since
threads of Python take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from api.errors import ApiError, ClientDisconnected, retry_later
from api.limits import BODIES_AT_A_TIME, default_max_body_bytes

if TYPE_CHECKING:
    from engine.frontend.async_engine import ServedEngine

LONG_BODY_BYTES = 64 * 2**10

Result = TypeVar("Result")


@dataclass(slots=True)
class Body:
    """A body that has come.

    Attributes:
        data: Its bytes; none once the request has been read, which may run for long.
        turn: Long bodies wait for it; None: this one is short.
        arrival: When the request came, in seconds of `time.perf_counter`.
    """

    data: bytearray
    turn: asyncio.Semaphore | None
    arrival: float

    async def read(self, read: Callable[[bytearray], Result]) -> Result:
        """What `read` makes of the bytes, in a thread."""
        return await self.work(lambda: read(self.data))

    async def work(self, work: Callable[[], Result]) -> Result:
        """The result of work that takes as long as the body is long, in a thread."""
        if self.turn is None:
            return await asyncio.to_thread(work)
        async with self.turn:
            return await asyncio.to_thread(work)


class Bodies:
    """The bodies that are on their way.

    Args:
        max_bytes: The longest that is taken; None: near what the model's longest sequence can need.
    """

    def __init__(self, engine: ServedEngine, max_bytes: int | None = None) -> None:
        self._engine, self._max_bytes = engine, max_bytes
        self._num_bytes = 0
        self._turn = asyncio.Semaphore(1)

    @property
    def max_bytes(self) -> int:
        return self._max_bytes or default_max_body_bytes(self._engine.max_model_len)

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[Body]:
        """The whole body, which counts as being on its way within the block.

        Raises:
            ApiError: 413, the body is too long; 415, it is compressed; 503, too many long ones are on their way.
            ClientDisconnected: The client hung up while it sent, or the time for it is over.
        """
        arrival = time.perf_counter()
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("identity", ""):
            raise ApiError(
                415,
                f"a body of Content-Encoding {encoding} is not read by this server; send it uncompressed",
                code="unsupported_content_encoding",
            )
        declared = request.headers.get("content-length", "")
        self._check_length(int(declared) if declared.isdecimal() and len(declared) < 20 else 0)
        data = bytearray()
        taken = 0
        try:
            async for part in request.stream():
                self._check_length(len(data) + len(part))
                # A short one always finds room: who holds all of it with long ones stops no others.
                if len(data) + len(part) > LONG_BODY_BYTES:
                    self._take(len(data) + len(part) - taken)
                    taken = len(data) + len(part)
                data += part
            body = Body(data, self._turn if len(data) > LONG_BODY_BYTES else None, arrival)
            del data
            try:
                yield body
            finally:
                # Not cleared: a thread may still read it.
                body.data = bytearray()
        except ClientDisconnect:
            raise ClientDisconnected from None
        finally:
            self._num_bytes -= taken

    def _check_length(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise ApiError(
                413,
                f"the body is larger than {self.max_bytes} bytes (--max-body-size)",
                code="body_too_large",
            )

    def _take(self, num_bytes: int) -> None:
        most = BODIES_AT_A_TIME * self.max_bytes
        if self._num_bytes + num_bytes > most:
            why = f"long bodies on their way have {most} bytes together, which is the most"
            raise retry_later(503, why, "overloaded", 1)
        self._num_bytes += num_bytes


async def off_loop(is_long: bool, work: Callable[[], Result]) -> Result:
    """The result of work, in a thread where it takes long."""
    return await asyncio.to_thread(work) if is_long else work()


def json_response(content: msgspec.Struct, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), headers=headers, media_type="application/json")
