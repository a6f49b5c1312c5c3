"""A server of streamed /v1/completions over a real socket, in a thread of its own, with canned behaviour."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

Fault = Literal["refuse", "break", "no usage", "error event"]

TOKENS_PER_WORD = 2


class CompletionsServer:
    """Answers with `max_tokens` events of one word each.

    Attributes:
        bodies: The JSON bodies received, in order of arrival.
        authorizations: The Authorization header of each.
        fault: What goes wrong, if anything does.
        good_answers: How many requests are answered well before that.
        gate: Answers wait until this many requests are open at once.
        most_open: The most requests ever open at once.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.fault: Fault | None = None
        self.good_answers = 0
        self.gate = 1
        self.most_open = 0
        self.port = 0
        self._open = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until the client closes it."""
        while head := await reader.readline():
            headers: dict[str, str] = {}
            while (line := (await reader.readline()).decode().strip()) != "":
                name, _, value = line.partition(": ")
                headers[name.lower()] = value
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if head.startswith(b"GET /v1/models "):
                self._write_json(writer, 200, {"data": [{"id": "tiny"}]})
            elif head.startswith(b"GET /version "):
                self._write_json(writer, 200, {"version": "1.2.3"})
            else:
                self.authorizations.append(headers.get("authorization"))
                self.bodies.append(json.loads(body))
                fault = self.fault if len(self.bodies) > self.good_answers else None
                if fault == "refuse":
                    self._write_json(writer, 400, {"error": {"message": "max_tokens: too many"}})
                elif not await self._stream(writer, self.bodies[-1], fault):
                    break
            await writer.drain()
        writer.close()

    def _write_json(self, writer: asyncio.StreamWriter, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} -\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], fault: Fault | None) -> bool:
        """Write the events; False if the connection is to be cut."""

        async def send(event: str) -> None:
            data = f"data: {event}\n\n".encode()
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)

        self._open += 1
        self.most_open = max(self.most_open, self._open)
        while self.most_open < self.gate:
            await asyncio.sleep(0.001)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for position in range(body["max_tokens"]):
            last = position == body["max_tokens"] - 1
            choice = {"index": 0, "text": f" word{position}", "finish_reason": "length" if last else None}
            await send(json.dumps({"choices": [choice], "usage": None}))
            if fault == "break":
                self._open -= 1
                return False
            if fault == "error event":
                await send(json.dumps({"error": {"message": "the engine died"}}))
        if fault != "no usage":
            usage = {
                "prompt_tokens": TOKENS_PER_WORD * len(body["prompt"].split()),
                "completion_tokens": body["max_tokens"],
                "prompt_tokens_details": {"cached_tokens": 3},
            }
            await send(json.dumps({"choices": [], "usage": usage}))
        await send("[DONE]")
        writer.write(b"0\r\n\r\n")
        self._open -= 1
        return True


@contextmanager
def running_server() -> Iterator[CompletionsServer]:
    """A server listening on a free port, gone with its thread on exit."""
    server = CompletionsServer()
    loop = asyncio.new_event_loop()
    listening, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with await asyncio.start_server(server.handle, "127.0.0.1", 0) as listener:
            server.port = listener.sockets[0].getsockname()[1]
            listening.set()
            await stop.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        if not listening.wait(timeout=30):
            raise TimeoutError("the test's server did not start listening")
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
