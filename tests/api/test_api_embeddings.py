"""/v1/embeddings through the official client."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.api.conftest import API_KEY, ServerProcess

INPUTS = ["The capital of France is", "A dog", "東京 😀"]


def embed(client: openai.OpenAI, **arguments: Any) -> np.ndarray:
    answer = client.embeddings.create(**{"model": "llama", "input": INPUTS, **arguments})
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data], np.float32)


def test_an_answer_has_openais_shape(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="llama", input="The capital of France is", user="somebody")
    assert (answer.object, answer.model) == ("list", "llama")
    [item] = answer.data
    assert (item.object, item.index, len(item.embedding)) == ("embedding", 0, 576)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)
    assert np.linalg.norm(item.embedding) == pytest.approx(1)


def test_a_prompt_is_cut_to_what_is_asked(client: openai.OpenAI) -> None:
    token_ids = [[40, 50, 60, 70]]
    last, first, whole = (
        embed(client, input=token_ids, extra_body=fields)
        for fields in (
            {"truncate_prompt_tokens": 2},
            {"truncate_prompt_tokens": 2, "truncation_side": "right"},
            {"truncate_prompt_tokens": -1},
        )
    )
    assert np.array_equal(last, embed(client, input=[[60, 70]]))
    assert np.array_equal(first, embed(client, input=[[40, 50]]))
    assert np.array_equal(whole, embed(client, input=token_ids))


def test_base64_equals_floats(client: openai.OpenAI, http: httpx.Client) -> None:
    """The client asks for base64, and reads it, unless it is told otherwise."""
    by_default = embed(client)
    assert np.array_equal(by_default, embed(client, encoding_format="float"))
    body = {"input": INPUTS, "encoding_format": "base64"}
    data = http.post("/v1/embeddings", json=body).json()["data"]
    read = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data]
    assert np.array_equal(by_default, np.stack(read))
    [numbers] = http.post("/v1/embeddings", json={"input": INPUTS[0]}).json()["data"]
    assert np.array_equal(np.array(numbers["embedding"], np.float32), by_default[0])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_texts_and_token_ids_alone_and_together(client: openai.OpenAI, pooling: str) -> None:
    extra = {"pooling": pooling}
    together = embed(client, extra_body=extra)
    for text, expected in zip(INPUTS, together, strict=True):
        assert np.array_equal(embed(client, input=text, extra_body=extra)[0], expected)
    ids = [504, 3575, 282, 4649, 314]
    assert np.array_equal(embed(client, input=ids, extra_body=extra)[0], together[0])
    assert np.array_equal(embed(client, input=[ids, ids], extra_body=extra), together[[0, 0]])


def test_dimensions_and_length(client: openai.OpenAI) -> None:
    raw = embed(client, extra_body={"normalize": False})
    cut = embed(client, dimensions=32)
    assert cut.shape == (3, 32)
    np.testing.assert_allclose(
        cut, raw[:, :32] / np.linalg.norm(raw[:, :32], axis=1, keepdims=True), rtol=1e-5
    )
    assert not np.allclose(embed(client), embed(client, extra_body={"pooling": "mean"}))


def test_many_clients_beside_generation(server: ServerProcess, client: openai.OpenAI) -> None:
    expected = embed(client)

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY) as client:
            generating = [
                client.completions.create(model="llama", prompt="Once", max_tokens=12) for _ in range(4)
            ]
            answers, *_ = await asyncio.gather(
                asyncio.gather(*(client.embeddings.create(model="llama", input=INPUTS) for _ in range(6))),
                *generating,
            )
            for answer in answers:
                assert np.array_equal([item.embedding for item in answer.data], expected)

    asyncio.run(ask())


def test_they_are_counted(http: httpx.Client) -> None:
    def counts() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = counts()
    http.post("/v1/embeddings", json={"input": [[1, 2, 3], [4, 5]]})
    after = counts()
    tokens = 'engine_prompt_tokens_total{model_name="llama"}'
    ended = 'engine_request_success_total{finished_reason="stop",model_name="llama"}'
    assert after[tokens] == before[tokens] + 5
    assert after[ended] == before.get(ended, 0) + 2
