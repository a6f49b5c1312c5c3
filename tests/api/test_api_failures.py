"""What a client sees when the engine fails at a chosen moment, and what the engine sees of clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from api import serve
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams
from engine.errors import ConfigError, EngineDeadError, RequestError
from tests.helpers.scripted import ScriptedEngine, serving

pytestmark = pytest.mark.anyio

COMPLETION = {"prompt": "hello"}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
ENDPOINTS = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]
ENDED = "the engine has ended; the server's log has the cause"
Samples = AsyncGenerator[CompletionOutput, None]


def events(body: str) -> list[str]:
    return [line.removeprefix("data: ") for line in body.split("\n\n") if line]


async def dies_at_once(prompt: list[int], params: SamplingParams) -> Samples:
    raise EngineDeadError("the engine process was killed by signal 9")
    yield


async def dies_after_two(prompt: list[int], params: SamplingParams) -> Samples:
    yield CompletionOutput(0, "a", [1])
    yield CompletionOutput(0, "b", [2])
    raise EngineDeadError("the engine process was killed by signal 9")


async def breaks_after_one(prompt: list[int], params: SamplingParams) -> Samples:
    yield CompletionOutput(0, "a", [1])
    raise ZeroDivisionError("a secret")


async def refuses(prompt: list[int], params: SamplingParams) -> Samples:
    raise RequestError("prompt has 500 tokens; the model takes at most 100", "prompt")
    yield


async def fails_alone(prompt: list[int], params: SamplingParams) -> Samples:
    if prompt == [1]:
        yield CompletionOutput(0, "a", [1])
    yield CompletionOutput(0, finish_reason="error")


async def never_ends(prompt: list[int], params: SamplingParams) -> Samples:
    yield CompletionOutput(0, "a", [1])
    await asyncio.Event().wait()


async def never_begins(prompt: list[int], params: SamplingParams) -> Samples:
    await asyncio.Event().wait()
    yield


async def second_prompt_fails(prompt: list[int], params: SamplingParams) -> Samples:
    if prompt == [2]:
        raise RequestError("token 2 is bad", "prompt")
    async for sample in never_ends(prompt, params):
        yield sample


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_death_before_the_first_token_is_503(path: str, body: dict, stream: bool) -> None:
    async with serving(ScriptedEngine(dies_at_once)) as client:
        response = await client.post(path, json={**body, "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["message"] == ENDED


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_death_in_mid_stream_is_an_error_event_then_done(path: str, body: dict) -> None:
    async with serving(ScriptedEngine(dies_after_two)) as client:
        response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    *chunks, error, done = events(response.text)
    assert "b" in chunks[-1]
    assert json.loads(error)["error"] == {
        "message": ENDED,
        "type": "server_error",
        "param": None,
        "code": "engine_dead",
    }
    assert done == "[DONE]"


async def test_an_unplanned_error_in_mid_stream_names_its_type_only() -> None:
    async with serving(ScriptedEngine(breaks_after_one)) as client:
        response = await client.post("/v1/completions", json={**COMPLETION, "stream": True})
    assert "ZeroDivisionError" in events(response.text)[-2]
    assert "secret" not in response.text


async def test_a_request_that_fails_inside_the_engine_is_500() -> None:
    async with serving(ScriptedEngine(fails_alone)) as client:
        early = await client.post("/v1/completions", json={"prompt": [2], "stream": True})
        late = await client.post("/v1/completions", json={"prompt": [1], "stream": True})
    assert early.status_code == 500
    assert early.json()["error"]["message"] == "the sampler failed"
    assert json.loads(events(late.text)[-2])["error"] == early.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_a_refusal_is_400_and_names_the_field(path: str, body: dict, stream: bool) -> None:
    async with serving(ScriptedEngine(refuses)) as client:
        response = await client.post(path, json={**body, "stream": stream})
    assert response.status_code == 400
    assert response.json()["error"]["param"] in body


@pytest.mark.parametrize("stream", [False, True])
async def test_one_refused_prompt_aborts_its_siblings(stream: bool) -> None:
    engine = ScriptedEngine(second_prompt_fails)
    async with serving(engine) as client:
        body = {"prompt": [[1], [2], [3]], "stream": stream}
        response = await client.post("/v1/completions", json=body)
    # A stream may already have begun with a sibling's token.
    assert "token 2 is bad" in response.text
    assert engine.num_closed == engine.num_opened == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [never_ends, never_begins])
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_a_client_that_hangs_up_closes_its_request(path: str, body: dict, script, stream: bool) -> None:
    engine = ScriptedEngine(script)
    async with serving(engine) as client:
        request = asyncio.create_task(client.post(path, json={**body, "stream": stream}))
        while engine.num_opened == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # for what it yields first
        request.cancel()
        await asyncio.wait_for(engine.closed.wait(), 600)
        metrics = (await client.get("/metrics")).text
    assert engine.num_opened == 1
    assert 'engine_request_success_total{finished_reason="abort",model_name="scripted"} 1.0' in metrics


@pytest.mark.parametrize(
    ("host", "port", "words"), [("127.0.0.1", 65536, "--port"), ("192.0.2.1", 0, "--host")]
)
async def test_an_address_that_cannot_be_listened_on_is_a_config_error(
    host: str, port: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        await serve(cast(Any, ScriptedEngine(never_ends)), host, port, served_model_names=["scripted"])


async def test_a_client_that_does_not_read_stalls_nobody() -> None:
    produced = 0

    async def floods(prompt: list[int], params: SamplingParams) -> Samples:
        nonlocal produced
        while prompt == [1]:
            produced += 1
            yield CompletionOutput(0, "flood" * 2**15, [1])
            await asyncio.sleep(0)
        yield CompletionOutput(0, "calm", [1], finish_reason="stop")

    async with (
        serving(ScriptedEngine(floods)) as client,
        client.stream("POST", "/v1/completions", json={"prompt": [1], "stream": True}),
    ):
        before = -1
        # It stops where the buffers of the connection are full: nothing piles up in the server.
        while produced > before:
            before = produced
            answer = await client.post("/v1/completions", json={"prompt": [2]})
            assert answer.json()["choices"][0]["text"] == "calm"
            await asyncio.sleep(0.2)


@pytest.mark.parametrize(("status", "code"), [("starting", "starting"), ("dead", "engine_dead")])
async def test_everything_but_metrics_is_503_without_an_engine(status, code: str) -> None:
    engine = ScriptedEngine(never_ends, status)
    engine.error = "CheckpointError: model.norm.weight is missing" if status == "dead" else None
    async with serving(engine) as client:
        answers = [await client.get("/health"), await client.get("/v1/models")]
        answers += [await client.post(path, json=body) for path, body in ENDPOINTS]
        metrics = await client.get("/metrics")
    for answer in answers:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == code
        assert status == "starting" or answer.json()["error"]["message"] == ENDED
    assert metrics.status_code == 200


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        (dies_at_once, 503, ENDED),
        (breaks_after_one, 500, "internal error (ZeroDivisionError)"),
        (fails_alone, 500, "the state is not finite"),
    ],
)
async def test_an_embedding_that_fails_takes_those_beside_it(script: Any, status: int, words: str) -> None:
    engine = ScriptedEngine(script)
    async with serving(engine) as client:
        response = await client.post("/v1/embeddings", json={"input": [[2], [1], [1, 2]]})
        assert response.status_code == status
        assert words in response.json()["error"]["message"]
        await engine.closed.wait()


async def test_hanging_up_aborts_embeddings() -> None:
    engine = ScriptedEngine(never_ends)
    async with serving(engine) as client:
        asking = asyncio.create_task(client.post("/v1/embeddings", json={"input": ["a", "b"]}))
        while engine.num_opened < 2:
            await asyncio.sleep(0.01)
        asking.cancel()
        await engine.closed.wait()
        assert engine.num_closed == 2
