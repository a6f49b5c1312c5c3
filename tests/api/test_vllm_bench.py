"""What vLLM's `bench serve` sends, backend by backend, and what it reads of the answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

SAMPLING = {
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.01,
    "temperature": 0.8,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "repetition_penalty": 1.1,
}
"""What its options of these names add to a body."""

TOKENS = 24


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON of each event. The name of a request, which it sends with some datasets, comes back."""
    headers = {"x-request-id": "bench-7"}
    with http.stream(
        "POST", path, json={"model": "llama", "stream": True, **body}, headers=headers
    ) as answer:
        text = answer.read().decode()
    assert answer.status_code == 200, text
    assert answer.headers["x-request-id"] == "bench-7"
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, SAMPLING], ids=["plain", "greedy", "sampled"])
@pytest.mark.parametrize("prompt", ["Once upon a time", [12, 99, 1234, 7]], ids=["text", "token ids"])
def test_completions(http: httpx.Client, prompt: Any, sampling: dict[str, float]) -> None:
    body = {
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": TOKENS,
        "logprobs": None,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **sampling,
    }
    chunks = events(http, "/v1/completions", body)
    assert all(isinstance(chunk["choices"][0]["text"], str) for chunk in chunks if chunk["choices"])
    # The counts come in a chunk without choices.
    [usage] = [chunk["usage"] for chunk in chunks if not chunk["choices"]]
    assert usage["completion_tokens"] == TOKENS
    assert usage["prompt_tokens"] == 4


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["plain", "sampled"])
def test_chats(http: httpx.Client, sampling: dict[str, float]) -> None:
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}],
        "max_completion_tokens": TOKENS,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **sampling,
    }
    chunks = events(http, "/v1/chat/completions", body)
    assert any(chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"])
    [usage] = [chunk["usage"] for chunk in chunks if not chunk["choices"]]
    assert usage["completion_tokens"] == TOKENS


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["plain", "sampled"])
def test_responses(http: httpx.Client, sampling: dict[str, float]) -> None:
    body = {
        "input": "Tell me a story.",
        "max_output_tokens": TOKENS,
        "store": False,
        "ignore_eos": True,
        **sampling,
    }
    said = events(http, "/v1/responses", body)
    assert any(event["type"] == "response.output_text.delta" and event["delta"] for event in said)
    assert said[-1]["response"]["usage"]["output_tokens"] == TOKENS


@pytest.mark.parametrize("prompt", ["A text.", ["A text.", "Another."], [[5, 6, 7], [8]]])
def test_embeddings(http: httpx.Client, prompt: Any) -> None:
    body = {"model": "llama", "input": prompt, "truncate_prompt_tokens": -1}
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > 0
    assert len(answer.json()["data"]) == (len(prompt) if isinstance(prompt, list) else 1)


def test_what_it_asks_before_it_measures(http: httpx.Client) -> None:
    assert http.get("/v1/models").json()["data"][0]["id"] == "llama"
    tokens = http.post("/tokenize", json={"model": "llama", "prompt": "Once upon a time"}).json()["tokens"]
    assert (
        http.post("/detokenize", json={"model": "llama", "tokens": tokens}).json()["prompt"]
        == "Once upon a time"
    )
    assert b"engine_" in http.get("/metrics").content
