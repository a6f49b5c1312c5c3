"""No body, whatever is in it, makes a server fail, and what is invalid by construction is refused by name."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from api.app import create_app
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams
from engine.frontend.chat_format import ChatFormat
from tests.chaos.mutations import BODIES, mutants
from tests.chaos.server import running_server, small_options
from tests.helpers.chat_templates import TEMPLATES, tokenizer_of
from tests.helpers.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio


async def answers(prompt: list[int], params: SamplingParams) -> Any:
    for index in range(params.n):
        yield CompletionOutput(index, "a", [97], finish_reason="stop")


def client_of_an_app() -> httpx.AsyncClient:
    engine = ScriptedEngine(answers)
    engine.tokenizer = tokenizer_of(TEMPLATES["hermes"])
    engine.chat_format = ChatFormat(engine.tokenizer)
    engine.max_model_len = 4000
    app = create_app(cast(Any, engine), served_model_names=["scripted"])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(base_url="http://server", transport=transport)


HEADERS = {"content-type": "application/json"}


@pytest.mark.parametrize("path", sorted(BODIES))
async def test_what_is_mutated_is_valid(path: str) -> None:
    async with client_of_an_app() as client:
        response = await client.post(path, json=BODIES[path])
        assert response.status_code == 200, response.text


async def check(client: httpx.AsyncClient, number: int, seed: int) -> None:
    began, statuses = time.monotonic(), Counter[int]()
    for mutant in mutants(number, seed):
        response = await client.post(mutant.path, content=mutant.body, headers=HEADERS)
        statuses[response.status_code] += 1
        told = f"{mutant.path} {mutant.body[:1000]!r}\n{response.status_code} {response.text[:1000]}"
        assert response.status_code < 500, told
        assert "internal error" not in response.text, told
        if mutant.field is not None:
            assert response.status_code >= 400, told
            error = json.loads(response.text)["error"]
            assert mutant.field in f"{error.get('param')} {error['message']}", told
    print(f"{number} bodies in {time.monotonic() - began:.0f} s: {dict(sorted(statuses.items()))}")
    assert statuses[200] > number / 50


async def test_mutated_bodies() -> None:
    async with client_of_an_app() as client:
        await check(client, 3000, seed=0)


@pytest.mark.slow
async def test_many_mutated_bodies() -> None:
    async with client_of_an_app() as client:
        await check(client, 100_000, seed=1)


@pytest.mark.slow
@pytest.mark.process
async def test_mutated_bodies_over_http(small_model: Path) -> None:
    with running_server([*small_options(small_model), "--served-model-name", "scripted"]) as server:
        (engine,) = server.parts()["engine"]
        async with httpx.AsyncClient(base_url=server.base_url, timeout=600, trust_env=False) as client:
            await check(client, 5000, seed=2)
            assert (await client.get("/health")).status_code == 200
        assert server.parts()["engine"] == [engine]
        assert "Traceback" not in server.last_words()
