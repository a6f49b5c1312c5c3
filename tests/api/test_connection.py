"""What comes late or grows too long is refused before anybody asks who sent it; what waits for others is not late."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from api import body, connection
from api.body import Bodies
from api.errors import ApiError
from api.limits import BODIES_AT_A_TIME, MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams
from tests.helpers.scripted import ScriptedEngine, serving

pytestmark = pytest.mark.anyio

KEY = "secret"
BODY = json.dumps({"prompt": "a", "max_tokens": 1}).encode()


async def script(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
    yield CompletionOutput(0, text="b", token_ids=[98], finish_reason="length")


def head(path: str = "/v1/completions", *lines: str, key: str = KEY) -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: x", f"X-Api-Key: {key}", *lines, "", "")).encode()


async def exchange(client: httpx.AsyncClient, *pieces: bytes) -> bytes:
    """What is answered until the connection is closed, to what is sent and never ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_a_head_has_so_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    async with serving(ScriptedEngine(script), api_key=KEY) as client:
        for sent in (b"P", head()[:-2], head()[:-1]):
            answer = await exchange(client, sent)
            assert answer.startswith(b"HTTP/1.1 408 ")
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert "head was not complete after 0.2 s" in error["message"]


async def test_a_body_has_so_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.2)
    async with serving(ScriptedEngine(script), api_key=KEY) as client:
        answer = await exchange(client, head("/v1/completions", "Content-Length: 99"), BODY)
        assert answer.startswith(b"HTTP/1.1 408 ")
        # Who has been answered, and goes on sending, is left.
        answer = await exchange(client, head("/v1/completions", "Content-Length: 99", key="wrong"), BODY)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b" 408 " not in answer


async def test_a_connection_that_asks_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE_SECONDS", 0.2)
    async with serving(ScriptedEngine(script)) as client:
        assert await exchange(client) == b""


async def test_a_request_that_waits_for_the_one_before_it_is_not_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.1)

    async def slow(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        await asyncio.sleep(0.5)
        yield CompletionOutput(0, text="b", token_ids=[98], finish_reason="length")

    whole = head("/v1/completions", f"Content-Length: {len(BODY)}") + BODY
    last = head("/v1/completions", f"Content-Length: {len(BODY)}", "Connection: close") + BODY
    async with serving(ScriptedEngine(slow), api_key=KEY) as client:
        for cut in (5, len(last) - 5):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(whole + last[:cut])
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.write(last[cut:])
            rest = await reader.read()
            assert rest.count(b"HTTP/1.1 200 ") == 1
            writer.close()


@pytest.mark.parametrize(
    "piece", [b"a" * 4000, b"aaa: b\r\n" * 500, b"x"], ids=["a value", "values", "bytes"]
)
async def test_a_head_has_so_many_bytes(piece: bytes) -> None:
    async with serving(ScriptedEngine(script), api_key=KEY) as client:
        pieces = [head(key="wrong")[:-4] + b"\r\nX-Long: ", *[piece] * (MAX_HEAD_BYTES // len(piece) + 1)]
        if piece == b"aaa: b\r\n" * 500:
            pieces = [b"".join(pieces)]
        answer = await exchange(client, *pieces)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


async def test_headers_are_counted() -> None:
    async with serving(ScriptedEngine(script)) as client:
        for number, status in ((MAX_HEADERS - 6, 200), (MAX_HEADERS + 1, 431)):
            headers = {f"x-{index}": "a" for index in range(number)}
            response = await client.get("/version", headers=headers)
            assert response.status_code == status
        assert str(MAX_HEADERS) in response.json()["error"]["message"]


async def test_trailers_and_chunk_sizes_are_of_the_head() -> None:
    chunked = head("/v1/completions", "Transfer-Encoding: chunked")
    long = [b"a" * 4000] * 20
    async with serving(ScriptedEngine(script)) as client:
        for pieces in ((b"0\r\nX: ", *long), (b"0\r\n", *[b"X: a\r\n" * 50] * 20), (b"1;", *long)):
            answer = await exchange(client, chunked, *pieces)
            assert answer.startswith(b"HTTP/1.1 431 ") or answer == b""
        # As chopped as a body can be, it is one.
        chopped = BODY[:-1] + b" " * 20_000 + BODY[-1:]
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in chopped) + b"0\r\n\r\n"
        assert len(chunks) > MAX_HEAD_BYTES
        close = head("/v1/completions", "Transfer-Encoding: chunked", "Connection: close")
        assert (await exchange(client, close, chunks)).startswith(b"HTTP/1.1 200 ")


async def test_a_body_is_no_part_of_the_next_head() -> None:
    body = BODY + b" " * (MAX_HEAD_BYTES + 10_000)
    request = head("/v1/completions", f"Content-Length: {len(body)}") + body
    last = head("/v1/completions", f"Content-Length: {len(BODY)}", "Connection: close") + BODY
    async with serving(ScriptedEngine(script)) as client:
        answers = await exchange(client, request + last[:20], last[20:])
    assert answers.count(b"HTTP/1.1 200 ") == 2


async def test_so_many_requests_wait_for_an_answer() -> None:
    async def endless(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        await asyncio.Event().wait()
        yield CompletionOutput(0)

    request = head("/v1/completions", f"Content-Length: {len(BODY)}") + BODY
    engine = ScriptedEngine(endless)
    async with serving(engine) as client:
        assert await exchange(client, request * (MAX_PIPELINED + 2)) == b""
        await engine.closed.wait()


async def test_long_bodies_on_their_way_have_so_many_bytes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1000
    monkeypatch.setattr(body, "LONG_BODY_BYTES", 100)
    long = BODY + b" " * 100
    async with serving(ScriptedEngine(script), max_body_bytes=size) as client:
        response = await client.post("/v1/completions", content=b" " * (size + 1))
        assert response.status_code == 413
        assert "1000 bytes (--max-body-size)" in response.json()["error"]["message"]
        held = []
        for _ in range(BODIES_AT_A_TIME):
            _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(head("/v1/completions", f"Content-Length: {size}") + b" " * (size - 1))
            held.append(writer)
        refused = await client.post("/v1/completions", content=long)
        while refused.status_code != 503:
            refused = await client.post("/v1/completions", content=long)
        assert refused.headers["retry-after"] == "1"
        assert (await client.post("/v1/completions", content=BODY)).status_code == 200
        for writer in held:
            writer.close()
        while refused.status_code != 200:
            refused = await client.post("/v1/completions", content=long)


async def test_long_bodies_are_worked_on_one_at_a_time() -> None:
    running, most = 0, 0

    class Request:
        def __init__(self) -> None:
            self.headers: dict[str, str] = {}

        async def stream(self) -> AsyncGenerator[bytes, None]:
            yield b" " * 100_000

    bodies = Bodies(ScriptedEngine(script))  # type: ignore[arg-type]

    async def one() -> None:
        nonlocal running, most
        async with bodies.receive(Request()) as received:  # type: ignore[arg-type]

            def work() -> None:
                nonlocal running, most
                running += 1
                most = max(most, running)
                running -= 1

            assert len(received.data) == 100_000
            for _ in range(20):
                await received.work(work)
        # The request may run for long, and needs it no more.
        assert not received.data

    await asyncio.gather(*(one() for _ in range(4)))
    assert most == 1


def test_what_nothing_reads_is_not_kept() -> None:
    from api.protocol import CompletionRequest, decode_request

    fields: dict[str, Any] = {
        "prompt": "a",
        "metadata": {"a": [1, 2]},
        "user": None,
        "suffix": None,
        "store": [[]],
    }
    request = decode_request(bytearray(json.dumps(fields).encode()), CompletionRequest)
    assert (request.metadata, request.user, request.store) == (None, None, None)
    with pytest.raises(ApiError, match="unknown field: metdata"):
        decode_request(b'{"prompt": "a", "metdata": 1}', CompletionRequest)
