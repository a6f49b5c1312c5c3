"""A request that one engine has begun goes on at another: the same tokens and text as if it had stayed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import pytest

from engine import EngineConfig, SamplingParams
from engine.core.structured_outputs import StructuredOutputs
from engine.frontend.async_engine import AsyncEngine

pytestmark = pytest.mark.process

PROMPT = "Once upon a time, in a village at the edge of a dark forest, there lived"
CASES = [
    SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=0.9, seed=3, n=3, ignore_eos=True, logprobs=1),
    SamplingParams(
        max_tokens=24, temperature=0.8, seed=5, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=20
    ),
    SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, stop=(" the",), min_tokens=12),
    SamplingParams(
        max_tokens=40,
        temperature=0.9,
        seed=4,
        n=2,
        structured_outputs=StructuredOutputs(
            json={
                "properties": {"who": {"type": "string", "maxLength": 40}, "where": {"enum": ["日本", "😀"]}},
                "type": "object",
                "required": ["who", "where"],
                "additionalProperties": False,
            },
        ),
    ),
]


class Received:
    """What a client has of each sample."""

    def __init__(self, num_samples: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_samples)]
        self.texts = [""] * num_samples
        self.reasons: list[str | None] = [None] * num_samples

    async def read(
        self,
        engine: AsyncEngine,
        params: SamplingParams,
        resumed: Sequence[list[int] | None] = (),
        most: int = 10**6,
    ) -> None:
        """Reads until the request has ended, or one sample has `most` tokens."""
        # Another id: what the engine says last of the one that was left is not for this one.
        stream = engine.generate(PROMPT, params, "second" if resumed else "first", 0, resumed)
        async with aclosing(stream):
            async for output in stream:
                for sample in output.outputs:
                    self.tokens[sample.index] += sample.token_ids
                    self.texts[sample.index] += sample.text
                    self.reasons[sample.index] = sample.finish_reason
                if max(map(len, self.tokens)) >= most:
                    return


def test_a_resumed_request_is_the_one_that_was_not_interrupted() -> None:
    async def check() -> None:
        engine = AsyncEngine(
            EngineConfig(model="llama", quant="int8", kv_cache_memory="32MiB", num_threads=1)
        )
        await engine.start()
        try:
            for params in CASES:
                whole = Received(params.n)
                await whole.read(engine, params)
                assert None not in whole.reasons
                for most in (1, 7, 13):
                    parts = Received(params.n)
                    await parts.read(engine, params, most=most)
                    resumed = [
                        None if reason else list(tokens)
                        for tokens, reason in zip(parts.tokens, parts.reasons, strict=True)
                    ]
                    if any(tokens is not None for tokens in resumed):
                        await parts.read(engine, params, resumed)
                    assert vars(parts) == vars(whole)
        finally:
            await engine.shutdown()

    asyncio.run(asyncio.wait_for(check(), 600))
