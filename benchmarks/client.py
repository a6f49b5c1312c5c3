"""A client of streamed /v1/completions that stamps what arrives first and reads it after the scenario."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.metrics import RequestRecord
from benchmarks.scenarios import PlannedRequest

# A server that sends nothing for this long has hung.
_READ_TIMEOUT_SECONDS = 600.0


class ServerError(Exception):
    """The server cannot be reached, or its answer cannot be used; says which and what to do."""


@dataclass(slots=True)
class Exchange:
    """One request's answer as it came off the socket; times from `time.perf_counter`."""

    start: float = 0.0
    end: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    status: int | None = None
    error: str | None = None
    scheduled: float | None = None


def _lines(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Lines of a body with the time at which each was complete."""
    rest = b""
    for moment, piece in pieces:
        *complete, rest = (rest + piece).split(b"\n")
        for line in complete:
            yield moment, line.rstrip(b"\r")
    if rest and pieces:
        yield pieces[-1][0], rest


def _error_message(body: bytes) -> str:
    """The message of an OpenAI-style error body, or the body itself."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:200]


def read_exchange(exchange: Exchange, origin: float = 0.0) -> RequestRecord:
    """Turn an answer into a record, its times relative to `origin` (same clock, seconds)."""
    scheduled = None if exchange.scheduled is None else exchange.scheduled - origin

    def failed(reason: str) -> RequestRecord:
        return RequestRecord(
            exchange.start - origin,
            exchange.end - origin,
            scheduled=scheduled,
            error=reason,
            status=exchange.status,
        )

    if exchange.error is not None:
        return failed(exchange.error)
    if exchange.status != 200:
        body = b"".join(piece for _, piece in exchange.pieces)
        return failed(f"HTTP {exchange.status}: {_error_message(body)}")

    text_times: list[float] = []
    finished: float | None = None
    usage: dict[str, Any] | None = None
    for moment, line in _lines(exchange.pieces):
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        try:
            event = json.loads(data)
        except ValueError:
            return failed(f"not JSON in the stream: {data[:100]!r}")
        if "error" in event:
            return failed(_error_message(data))
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            if choice.get("text"):
                text_times.append(moment - origin)
            if choice.get("finish_reason") is not None:
                finished = moment - origin
    if finished is None:
        return failed("the stream ended without a finish_reason")
    if usage is None:
        return failed("no usage in the stream; the server must support stream_options.include_usage")
    details = usage.get("prompt_tokens_details") or {}
    return RequestRecord(
        start=exchange.start - origin,
        end=finished,
        text_times=text_times,
        input_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
        scheduled=scheduled,
        status=exchange.status,
    )


class CompletionsClient:
    """Sends requests to one model of one server; an async context manager.

    Args:
        base_url: The server's address, with or without a final "/v1".
        model: Model name; None takes the first one that the server lists (see `find_model`).
        ignore_eos: Ask for the full output length with the extra field `ignore_eos`.
    """

    def __init__(self, base_url: str, model: str | None, api_key: str | None, ignore_eos: bool) -> None:
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = httpx.AsyncClient(
            base_url=base_url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=httpx.Timeout(_READ_TIMEOUT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # a proxy that buffers would be measured in the server's place
        )
        self._model = model
        self._ignore_eos = ignore_eos

    async def __aenter__(self) -> CompletionsClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def find_model(self) -> str:
        """The model's name, asked of the server if none was given.

        Raises:
            ServerError: If the server does not answer or lists no model.
        """
        if self._model is None:
            try:
                response = await self._http.get("/v1/models")
            except httpx.HTTPError as error:
                raise ServerError(
                    f"no answer from {self._http.base_url}: {error}; is the server up?"
                ) from None
            if response.status_code != 200:
                message = _error_message(response.content)
                raise ServerError(f"/v1/models: HTTP {response.status_code}: {message}")
            names = [entry["id"] for entry in response.json()["data"]]
            if not names:
                raise ServerError(f"{self._http.base_url} lists no model; name one with --model")
            self._model = names[0]
        return self._model

    def body(self, request: PlannedRequest) -> bytes:
        """The JSON body of a request, streamed."""
        fields: dict[str, Any] = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **request.fields,
        }
        if self._ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps(fields).encode()

    async def send(self, body: bytes) -> Exchange:
        """Send one request and stamp its answer; a failed connection becomes the exchange's error."""
        exchange = Exchange(start=time.perf_counter())
        try:
            async with self._http.stream("POST", "/v1/completions", content=body) as response:
                exchange.status = response.status_code
                async for piece in response.aiter_raw():
                    exchange.pieces.append((time.perf_counter(), piece))
        except httpx.HTTPError as error:
            exchange.error = f"{type(error).__name__}: {error}".rstrip(": ")
        exchange.end = time.perf_counter()
        return exchange

    async def complete(self, request: PlannedRequest) -> RequestRecord:
        """Send one request and read its answer."""
        return read_exchange(await self.send(self.body(request)))

    async def run(
        self, requests: Sequence[PlannedRequest], concurrency: int | None, on_done: Callable[[], object]
    ) -> list[RequestRecord]:
        """Send all requests and return their records in the same order.

        Args:
            concurrency: Streams kept busy; None sends each request at its arrival time.
            on_done: Called when a request has ended.
        """
        # Encoding comes before and decoding after: the client may share its cores with the server.
        bodies = [self.body(request) for request in requests]
        slots = None if concurrency is None else asyncio.Semaphore(concurrency)
        origin = time.perf_counter()

        async def send_one(request: PlannedRequest, body: bytes) -> Exchange:
            if slots is None:
                arrival = origin + (request.arrival or 0.0)
                await asyncio.sleep(arrival - time.perf_counter())
                exchange = await self.send(body)
                exchange.scheduled = arrival
            else:
                async with slots:  # first come, first served: requests start in order
                    exchange = await self.send(body)
            on_done()
            return exchange

        pairs = zip(requests, bodies, strict=True)
        exchanges = await asyncio.gather(*(send_one(request, body) for request, body in pairs))
        return [read_exchange(exchange, origin) for exchange in exchanges]
