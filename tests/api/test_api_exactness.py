"""The server's answers are those of `LLM`, token by token, however requests meet in it."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from engine import LLM, SamplingParams
from tests.helpers.prompts import PROMPTS

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, dict[str, Any]]]:
    source = random.Random(0)
    return [
        (" ".join(source.sample(PROMPTS, source.randrange(1, 5))), {**OPTIONS[number % 4], "max_tokens": 12})
        for number in range(12)
    ]


@pytest.fixture(scope="module")
def alone(requests: list[tuple[str, dict[str, Any]]]) -> list[list[int]]:
    """Each request by itself in this process, where no other prompt's blocks are found."""
    llm = LLM(model="llama", quant="int8", kv_cache_memory="64MiB", enable_prefix_caching=False)
    results = [
        llm.generate(prompt, SamplingParams(**options, ignore_eos=True), use_tqdm=False)[0]
        for prompt, options in requests
    ]
    return [result.outputs[0].token_ids for result in results]


def test_tokens_are_those_of_llm(
    http: httpx.Client, requests: list[tuple[str, dict[str, Any]]], alone: list[list[int]]
) -> None:
    def complete(request: tuple[str, dict[str, Any]]) -> tuple[list[int], int]:
        prompt, options = request
        body = {"prompt": prompt, **options, "ignore_eos": True, "return_token_ids": True}
        answer = http.post("/v1/completions", json=body).raise_for_status().json()
        return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    with ThreadPoolExecutor(len(requests)) as pool:
        for is_warm in (False, True):
            answers, cached = zip(*pool.map(complete, requests), strict=True)
            assert list(answers) == alone
            assert not is_warm or sum(cached) > 0
