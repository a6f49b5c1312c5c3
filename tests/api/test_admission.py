"""What is refused where too much waits already, by every endpoint and before its answer begins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from api.admission import QueueLimits
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams
from engine.core.stats import EngineStats, Load
from engine.core.step_costs import StepCosts
from tests.helpers.scripted import ScriptedEngine, serving

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


@pytest.mark.parametrize(("path", "body"), ENDPOINTS[:2])
async def test_a_timeout_ends_a_request(path: str, body: dict[str, Any]) -> None:
    engine = ScriptedEngine(script)
    async with serving(engine) as client:
        whole = await client.post(path, json={**body, "timeout": 0.2})
        zero = await client.post(path, json={**body, "timeout": 0})
        streamed = await client.post("/v1/completions", json={"prompt": [1], "stream": True, "timeout": 0.2})
    assert (whole.status_code, whole.json()["error"]["code"]) == (408, "timeout")
    assert whole.headers["x-should-retry"] == "false"
    assert (zero.status_code, zero.json()["error"]["param"]) == (400, "timeout")
    chunk, error, done = (line for line in streamed.text.splitlines() if line)
    assert '"text":"a"' in chunk
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert done == "data: [DONE]"
    assert engine.num_closed == engine.num_opened == 2


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
