"""What is refused where too much waits already, by every endpoint and before its answer begins."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from api.admission import Admission, QueueLimits
from api.errors import ApiError
from api.slow_readers import SlowReaderProtocol
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams
from engine.core.stats import EngineStats, Load
from engine.core.step_costs import StepCosts
from tests.helpers.scripted import BytesTokenizer, ScriptedEngine, serving

pytestmark = pytest.mark.anyio

CHAT = [{"role": "user", "content": "ab"}]
ENDPOINTS = [
    ("/v1/completions", {"prompt": "ab"}),
    ("/v1/chat/completions", {"messages": CHAT}),
    ("/v1/responses", {"input": "ab"}),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 5}),
]
LOAD = Load(
    step_costs=StepCosts(prompt_token=0.5),
    num_step_tokens=10,
    num_prompt_step_tokens=10,
    num_slots=1,
    slot_seconds=30.0,
)


async def script(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
    """The prompt of one token runs for ever; others wait for ever."""
    if len(prompt) == 1:
        yield CompletionOutput(0, "a", [1])
    await asyncio.Event().wait()


@asynccontextmanager
async def full(limits: QueueLimits) -> AsyncIterator[tuple[httpx.AsyncClient, list[asyncio.Task[Any]]]]:
    """A server with one slot, which is taken, and one request of ten tokens that waits."""
    engine = ScriptedEngine(script)
    engine.stats = EngineStats(load=LOAD)
    async with serving(engine, limits) as client:
        tasks = []
        for number, prompt in enumerate(([1], [1] * 10), 1):
            tasks.append(asyncio.create_task(client.post("/v1/completions", json={"prompt": prompt})))
            while engine.num_opened < number:
                await asyncio.sleep(0.01)
        try:
            yield client, tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def computes(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
    """The prompt begins at once, and takes for ever."""
    yield CompletionOutput(0)
    await asyncio.Event().wait()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_a_full_queue_is_429_at_once(path: str, body: dict[str, Any], stream: bool) -> None:
    async with full(QueueLimits(max_queued_requests=1)) as (client, _):
        response = await client.post(path, json={**body, "stream": stream})
        metrics = (await client.get("/metrics")).text
    assert response.status_code == 429
    # The one that runs, and the one that waits, take 30 s each; then a token of its own.
    assert response.headers["retry-after"] == "61"
    error = response.json()["error"]
    assert error["type"] == "rate_limit_error"
    assert "--max-queued-requests is 1" in error["message"]
    assert 'engine_refused_requests_total{model_name="scripted",reason="queue_full"} 1.0' in metrics


@pytest.mark.parametrize(
    ("limits", "fitting", "refused", "words"),
    [
        (QueueLimits(max_queued_tokens=12), 2, 3, "--max-queued-tokens is 12"),
        # 60 s for slots and half of one for each token, with a margin of a half.
        (QueueLimits(slo_ttft_ms=92_000), 2, 10, "predicted after 97.5 s, and --slo-ttft-ms is 92000"),
    ],
)
async def test_a_prompt_that_does_not_fit_is_429(
    limits: QueueLimits, fitting: int, refused: int, words: str
) -> None:
    async with full(limits) as (client, tasks):
        response = await client.post("/v1/completions", json={"prompt": [1] * refused})
        assert response.status_code == 429
        assert words in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) >= 1
        tasks.append(asyncio.create_task(client.post("/v1/completions", json={"prompt": [1] * fitting})))
        await asyncio.sleep(0.2)
        assert not tasks[-1].done()


@pytest.mark.parametrize(("path", "body"), [*ENDPOINTS[:2], ("/v1/embeddings", {"input": "ab"})])
async def test_who_waits_too_long_gets_503(path: str, body: dict[str, Any]) -> None:
    engine = ScriptedEngine(script)
    async with serving(engine, QueueLimits(queue_timeout=0.2)) as client:
        response = await client.post(path, json=body)
        # It has begun, and nobody waits any more.
        begun = asyncio.create_task(client.post("/v1/completions", json={"prompt": [1]}))
        assert not (await asyncio.wait((begun,), timeout=0.5))[0]
        begun.cancel()
        await asyncio.gather(begun, return_exceptions=True)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout")
    assert int(response.headers["retry-after"]) >= 1
    assert engine.num_closed == engine.num_opened == 2


async def test_a_prompt_that_is_being_computed_does_not_wait() -> None:
    engine = ScriptedEngine(computes)
    async with serving(engine, QueueLimits(queue_timeout=0.2)) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "ab"}))
        assert not (await asyncio.wait((asking,), timeout=0.5))[0]
        timed = await client.post("/v1/completions", json={"prompt": "ab", "timeout": 0.3})
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert (timed.status_code, timed.json()["error"]["code"]) == (408, "timeout")


@pytest.mark.parametrize(("path", "body"), [*ENDPOINTS, ("/v1/embeddings", {"input": "ab"})])
async def test_a_timeout_ends_a_request(path: str, body: dict[str, Any]) -> None:
    engine = ScriptedEngine(script)
    async with serving(engine, QueueLimits(queue_timeout=600)) as client:
        whole = await client.post(path, json={**body, "timeout": 0.2})
        zero = await client.post(path, json={**body, "timeout": 0})
        streamed = await client.post("/v1/completions", json={"prompt": [1], "stream": True, "timeout": 0.2})
    assert whole.status_code == 408
    assert "timeout: the request has not ended within its 0.2 s" in whole.json()["error"]["message"]
    assert whole.headers["x-should-retry"] == "false"
    assert zero.status_code == 400
    assert "timeout must be above 0" in zero.json()["error"]["message"]
    chunk, error, done = (line for line in streamed.text.splitlines() if line)
    assert '"text":"a"' in chunk
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert done == "data: [DONE]"
    assert engine.num_closed == engine.num_opened == 2


async def test_a_timeout_counts_from_the_arrival() -> None:
    """Tokenizing alone takes longer, and the answer would be there at once."""

    class SlowTokenizer(BytesTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            time.sleep(0.5)
            return super().encode(text, add_special_tokens)

    async def at_once(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        yield CompletionOutput(0, "a", [1], finish_reason="stop")

    engine = ScriptedEngine(at_once)
    engine.tokenizer = SlowTokenizer()
    async with serving(engine, QueueLimits(queue_timeout=0.3)) as client:
        # In the queue it has not been for so long.
        await client.post("/v1/completions", json={"prompt": "ab"})
        late = await client.post("/v1/completions", json={"prompt": "ab", "timeout": 0.3})
        in_time = await client.post("/v1/completions", json={"prompt": "ab", "timeout": 600})
    assert (late.status_code, in_time.status_code) == (408, 200)


async def floods(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
    while True:
        yield CompletionOutput(0, "flood" * 2**10, [1])
        await asyncio.sleep(0)


async def open_stream(client: httpx.AsyncClient) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port, limit=2**10)
    body = b'{"prompt": [1], "stream": true}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return reader, writer


async def test_a_client_that_stops_reading_is_hung_up_on() -> None:
    engine = ScriptedEngine(floods)
    async with serving(engine, send_seconds=0.5) as client:
        _, writer = await open_stream(client)
        while not engine.num_closed:
            await asyncio.sleep(0.05)
        metrics = (await client.get("/metrics")).text
        writer.close()
    assert 'engine_slow_readers_total{model_name="scripted"} 1.0' in metrics


async def test_a_client_that_reads_slowly_is_served() -> None:
    engine = ScriptedEngine(floods)
    async with serving(engine, send_seconds=0.5) as client:
        reader, writer = await open_stream(client)
        # What is buffered between the two at first.
        for _ in range(100):
            await reader.read(2**20)
        for _ in range(10):
            await asyncio.sleep(0.2)
            for _ in range(20):
                await reader.read(2**20)
        assert engine.num_closed == 0
        writer.close()
        await engine.closed.wait()


async def test_an_answer_that_is_read_is_delivered_after_one_that_was_read_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {1: 140_000, 2: 600_000}

    async def long(prompt: list[int], params: SamplingParams) -> AsyncGenerator[CompletionOutput, None]:
        yield CompletionOutput(0, "x" * sizes[len(prompt)], [1], finish_reason="stop")

    made = SlowReaderProtocol.connection_made

    def connection_made(self: SlowReaderProtocol, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 40_000)
        made(self, transport)

    monkeypatch.setattr(SlowReaderProtocol, "connection_made", connection_made)
    async with serving(ScriptedEngine(long)) as client:
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
            raw.setblocking(False)
            await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", client.base_url.port))
            reader, writer = await asyncio.open_connection(sock=raw, limit=2**10)
            for number, size in sizes.items():
                body = json.dumps({"prompt": [1] * number}).encode()
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                writer.write(head % len(body) + body)
                # The first answer is whole, in buffers, before any of it is read.
                await asyncio.sleep(0.3)
                length = int(re.search(rb"content-length: (\d+)", await _head_of(reader))[1])  # type: ignore[index]
                assert len(await reader.readexactly(length)) > size
            writer.close()


async def _head_of(reader: asyncio.StreamReader) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += await reader.readexactly(1)
    return head


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_prompts_of_one_request_count_together(path: str) -> None:
    field = "input" if path == "/v1/embeddings" else "prompt"
    engine = ScriptedEngine(script)
    engine.stats = EngineStats(load=LOAD)
    async with serving(engine, QueueLimits(max_queued_requests=2)) as client:
        body = {field: [[1, 2], [1, 2, 3], [1, 2, 3, 4]]}
        tasks = [asyncio.create_task(client.post(path, json=body)) for _ in range(10)]
        await asyncio.wait(tasks, timeout=600, return_when=asyncio.FIRST_COMPLETED)
        while sum(task.done() for task in tasks) < 9:
            await asyncio.sleep(0.01)
        assert {task.result().status_code for task in tasks if task.done()} == {429}
        assert engine.num_opened == 3
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_samples_that_have_ended_make_room_for_others() -> None:
    admission = Admission(lambda: EngineStats(load=LOAD), QueueLimits(max_queued_requests=1))
    place = admission.enter(10, 4)
    admission.begin(place)
    with pytest.raises(ApiError, match="3 requests wait, this adds 1"):
        admission.check_room([10], 1)
    admission.end_samples(place, 3)
    admission.check_room([10], 1)
    admission.leave(place)
    admission.leave(place)
    other = admission.enter(10, 1)
    admission.begin(other)
    admission.check_room([10], 1)


async def test_what_has_ended_makes_room() -> None:
    async with full(QueueLimits(max_queued_requests=1)) as (client, tasks):
        assert (await client.post("/v1/embeddings", json={"input": "ab"})).status_code == 429
        tasks[1].cancel()
        status = 429
        while status == 429:
            task = asyncio.create_task(client.post("/v1/completions", json={"prompt": "ab"}))
            done, _ = await asyncio.wait((task,), timeout=0.5)
            status = task.result().status_code if done else 0
        tasks.append(task)
