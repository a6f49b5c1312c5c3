"""Keys with limits of their own: which requests they open, how much they may have, and whose requests they are."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from api.app import create_app
from api.errors import ApiError
from api.keys import ApiKey, Client, KeyRing, TokenBucket, read_keys
from engine.core.outputs import CompletionOutput
from engine.errors import ConfigError
from tests.api.test_openapi import BODIES
from tests.helpers.scripted import ScriptedEngine


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def key_of(name: str, **limits: Any) -> ApiKey:
    """A key that is its name."""
    return ApiKey(name, digest_of(name), **limits)


class NotingEngine(ScriptedEngine):
    """Notes whose requests come, and with which priority."""

    def __init__(self) -> None:
        async def five_tokens(prompt: list[int], params: object) -> AsyncGenerator[CompletionOutput, None]:
            for index in range(5):
                yield CompletionOutput(0, "a", [97], finish_reason="stop" if index == 4 else None)

        super().__init__(five_tokens)
        self.asked: list[tuple[str, int]] = []

    def generate(
        self, prompt: Any, params: Any, request_id: str, priority: int = 0, *, owner: str = "", **others: Any
    ) -> Any:
        self.asked.append((owner, priority))
        return super().generate(prompt, params, request_id, priority, owner=owner, **others)

    async def embed(
        self, prompt: Any, params: Any, request_id: str, priority: int = 0, *, owner: str = ""
    ) -> Any:
        self.asked.append((owner, priority))
        return await super().embed(prompt, params, request_id, priority, owner=owner)


def client_of(engine: ScriptedEngine, *keys: ApiKey, **options: Any) -> TestClient:
    app = create_app(cast(Any, engine), served_model_names=["scripted"], api_keys=keys, **options)
    return TestClient(app)


def ask(client: TestClient, key: str, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    body = {**BODIES[path], **fields}
    return cast(httpx.Response, client.post(path, json=body, headers={"authorization": f"Bearer {key}"}))


GENERATING = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
)


def test_requests_are_the_keys_own() -> None:
    engine = NotingEngine()
    client = client_of(engine, key_of("one"), key_of("two", priorities=(3, 5)), api_key="plain")
    for path in GENERATING:
        for key in ("one", "two"):
            assert ask(client, key, path).status_code == 200
        # As Anthropic's clients send it; the one that is known counts.
        headers = {"x-api-key": "plain", "authorization": "Bearer other"}
        assert client.post(path, json=BODIES[path], headers=headers).status_code == 200
        assert ask(client, "three", path).status_code == 401
    # A key that may ask for none but other priorities has the nearest to 0 by default.
    assert engine.asked == [("one", 0), ("two", 3), (digest_of("plain"), 0)] * len(GENERATING)


@pytest.mark.parametrize("path", [path for path in GENERATING if path != "/v1/messages"])
def test_a_priority_that_the_key_may_not_have_is_refused(path: str) -> None:
    engine = NotingEngine()
    client = client_of(engine, key_of("one", priorities=(-1, 5)), key_of("any"))
    for priority in (-2, 6):
        refused = ask(client, "one", path, priority=priority)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "priority"
        assert "between -1 and 5" in refused.json()["error"]["message"]
        assert ask(client, "any", path, priority=priority).status_code == 200
    for priority in (-1, 5):
        assert ask(client, "one", path, priority=priority).status_code == 200
    assert [priority for _, priority in engine.asked] == [-2, 6, -1, 5]


def refusal(response: httpx.Response, name: str) -> int:
    """The seconds to wait that a 429 tells of, which names the limit."""
    assert response.status_code == 429
    error = response.json()["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert f"({name})" in error["message"]
    seconds = int(response.headers["retry-after"])
    assert f"try again in {seconds} s" in error["message"]
    return seconds


def test_requests_a_minute() -> None:
    engine = NotingEngine()
    client = client_of(engine, key_of("one", requests_per_minute=2), key_of("two"))
    assert [ask(client, "one").status_code for _ in range(2)] == [200, 200]
    assert 1 <= refusal(ask(client, "one", "/v1/embeddings"), "requests_per_minute") <= 30
    # What makes no work is not counted, nor are others.
    assert client.get("/v1/models", headers={"x-api-key": "one"}).status_code == 200
    assert ask(client, "two").status_code == 200
    assert len(engine.asked) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_a_minute(stream: bool) -> None:
    """A prompt of one token and an output of five; what is left over of a minute's allows another request."""
    engine = NotingEngine()
    client = client_of(engine, key_of("one", tokens_per_minute=11))
    assert [ask(client, "one", stream=stream).status_code for _ in range(2)] == [200, 200]
    # Twelve were taken: one too many, and one is needed. An embedding counts its prompt.
    assert 5 <= refusal(ask(client, "one", "/v1/embeddings"), "tokens_per_minute") <= 11
    client = client_of(engine, key_of("one", tokens_per_minute=1))
    assert ask(client, "one", "/v1/embeddings").status_code == 200
    refusal(ask(client, "one"), "tokens_per_minute")


def test_an_allowance_comes_back_evenly() -> None:
    now = 100.0
    allowance = TokenBucket(30, lambda: now)
    allowance.take(30)
    assert allowance.seconds_to_one() == pytest.approx(2.0)
    now += 1.5
    assert allowance.seconds_to_one() == pytest.approx(0.5)
    now += 2.5
    assert allowance.seconds_to_one() == 0.0
    allowance.take(62)
    assert allowance.seconds_to_one() == pytest.approx(2 * 61)
    now += 1000.0
    assert allowance.seconds_to_one() == 0.0
    # No more than a minute's is kept.
    allowance.take(30)
    assert allowance.seconds_to_one() > 0.0


@pytest.mark.anyio
async def test_requests_at_a_time() -> None:
    going_on = asyncio.Event()

    async def waits(prompt: list[int], params: object) -> AsyncGenerator[CompletionOutput, None]:
        yield CompletionOutput(0, "a", [97])
        await going_on.wait()
        yield CompletionOutput(0, "a", [97], finish_reason="stop")

    engine = ScriptedEngine(waits)
    keys = [key_of("one", concurrent_requests=2)]
    app = create_app(cast(Any, engine), served_model_names=["scripted"], api_keys=keys)
    transport = httpx.ASGITransport(app)
    headers = {"x-api-key": "one"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        body = {**BODIES["/v1/completions"], "stream": True}
        streams = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2)]
        while engine.num_opened < 2:
            await asyncio.sleep(0)
        assert refusal(await client.post("/v1/embeddings", json=body), "concurrent_requests") == 1
        going_on.set()
        assert [(await stream).status_code for stream in streams] == [200, 200]
        assert (await client.post("/v1/completions", json=body)).status_code == 200


def test_without_keys_the_one_that_is_sent_stands_for_its_owner() -> None:
    keys = KeyRing(None)
    for headers, key in (
        ({"authorization": "bearer  one "}, "one"),
        ({"x-api-key": "one"}, "one"),
        ({"authorization": "Bearer one", "x-api-key": "two"}, "one"),
        ({"authorization": "Basic one", "x-api-key": "two"}, "two"),
    ):
        client = keys.client(Headers(headers))
        assert client is not None
        assert client.owner == digest_of(key)
        # A key that anybody can make up brings no share of the engine of its own.
        assert client.share == ""
    nobody = keys.client(Headers({}))
    assert nobody is not None
    assert nobody.owner == ""


KEYS_FILE = f"""
[[keys]]
name = "one"
sha256 = "{digest_of("first")}"
requests_per_minute = 60
priorities = [-1, 10]

[[keys]]
name = "two"
sha256 = "{digest_of("second").upper()}"
"""


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS_FILE)
    keys = read_keys(str(path))
    assert keys[0] == ApiKey("one", digest_of("first"), requests_per_minute=60, priorities=(-1, 10))
    ring = KeyRing(None, keys)
    owners = [ring.client(Headers({"x-api-key": key})) for key in ("first", "second", digest_of("first"))]
    assert [owner and owner.owner for owner in owners] == ["one", "two", None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"one"', '"two"'), "two keys have the name two"),
        ((digest_of("first"), digest_of("second")), "two keys have the sha256"),
        (("requests_per_minute = 60", "requests_per_minute = 0"), r">= 1.*\$.keys\[0\].requests_per_minute"),
        (("requests_per_minute", "request_per_minute"), "unknown field `request_per_minute`"),
        (("-1, 10", "10, -1"), "one: priorities must be the smaller, then the larger"),
        (("-1, 10", "10"), r"length 2.*priorities"),
        ((digest_of("first"), "first"), "sha256"),
        (('name = "one"', ""), "missing required field `name`"),
        (("[[keys]]", "[[keys"), "line 2"),
    ],
)
def test_a_file_that_says_what_no_key_may_have(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS_FILE.replace(*change))
    with pytest.raises(ConfigError, match=f"api_keys: {path}: .*{message}"):
        read_keys(str(path))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_keys(str(tmp_path / "none"))


def test_refusals_take_nothing() -> None:
    client = Client("one", key_of("one", requests_per_minute=1, concurrent_requests=1), lambda: 0.0)
    client.enter()
    with pytest.raises(ApiError, match="concurrent_requests"):
        client.enter()
    client.leave()
    with pytest.raises(ApiError, match="requests_per_minute"):
        client.enter()
