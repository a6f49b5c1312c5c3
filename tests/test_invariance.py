"""A request's tokens depend on nothing but the request: not on its company, its chunks, the cache or preemption."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loading.resolve import resolve_model
from engine.request import Request
from engine.sampling.params import SamplingParams
from engine.tokenizer import load_tokenizer
from tests.prompts import PROMPTS

LENGTHS = [5, 16, 150, 33, 1, 80, 17, 64, 3, 48, 100, 11, 32, 24, 40, 7]
"""Prompt lengths of a batch of 16, some of them whole blocks."""

ALONE = [0, 1, 2, 3, 4, 12]
"""The requests that also run by themselves."""

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, max_tokens=12, ignore_eos=True, n=2)

Tokens = dict[tuple[int, int], list[int]]
"""Output tokens by request and sample."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Passages of LENGTHS tokens that start at different places of one text."""
    text = load_tokenizer(resolve_model("llama")).encode("\n\n".join(PROMPTS))
    assert len(text) > max(LENGTHS) + 10 * len(LENGTHS)
    return [text[10 * i : 10 * i + length] for i, length in enumerate(LENGTHS)]


def make_core(**options: Any) -> EngineCore:
    options = {"kv_cache_memory": "64MiB", **options}
    config = EngineConfig(model="llama", quant="none", dtype="float32", device="cpu", **options)
    return EngineCore(config, resolve_model("llama"), eos_token_ids=())


def generate(
    core: EngineCore, prompts: list[list[int]], params: SamplingParams, indices: Sequence[int]
) -> Tokens:
    """Runs the prompts of these indices together."""
    for index in indices:
        core.add_request(
            Request(request_id=str(index), prompt_token_ids=prompts[index], params=params, seed=1000 + index)
        )
    tokens: Tokens = defaultdict(list)
    while core.has_work:
        for output in core.step():
            assert output.error is None
            tokens[int(output.request_id), output.index] += [token.token_id for token in output.tokens]
    assert len(tokens) == params.n * len(indices)
    assert {len(output) for output in tokens.values()} == {params.max_tokens}
    return dict(tokens)


def generate_alone(prompts: list[list[int]], params: SamplingParams, indices: Sequence[int]) -> Tokens:
    core = make_core(enable_prefix_caching=False)
    tokens: Tokens = {}
    for index in indices:
        tokens |= generate(core, prompts, params, [index])
    return tokens


@pytest.fixture(scope="module")
def alone(prompts: list[list[int]]) -> Tokens:
    return generate_alone(prompts, GREEDY, ALONE)


@pytest.fixture(scope="module")
def together(prompts: list[list[int]]) -> Tokens:
    """All 16 in one batch with a budget of 512 tokens, each with room for its whole life."""
    core = make_core(max_num_batched_tokens=512, enable_prefix_caching=False)
    tokens = generate(core, prompts, GREEDY, range(16))
    assert core.stats.num_preemptions == 0
    return tokens


def test_alone_and_in_a_batch_of_16(alone: Tokens, together: Tokens) -> None:
    assert {key: together[key] for key in alone} == alone


@pytest.mark.parametrize("budget", [16, 64])
def test_smaller_chunk_budgets(prompts: list[list[int]], together: Tokens, budget: int) -> None:
    core = make_core(max_num_batched_tokens=budget, max_num_seqs=16, enable_prefix_caching=False)
    assert generate(core, prompts, GREEDY, range(16)) == together
    assert core.stats.num_steps >= core.stats.num_scheduled_tokens / budget


def test_cold_and_warm_prefix_cache(prompts: list[list[int]], together: Tokens) -> None:
    core = make_core()
    assert generate(core, prompts, GREEDY, range(16)) == together
    hits = core.stats.prefix_cache_hits
    assert generate(core, prompts, GREEDY, range(16)) == together
    # Whole blocks are found, but for the last token, which is computed for its logits.
    whole_blocks = sum(min(length // 16 * 16, length - 1) for length in LENGTHS)
    assert core.stats.prefix_cache_hits - hits == whole_blocks


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_preemption(prompts: list[list[int]], together: Tokens, enable_prefix_caching: bool) -> None:
    core = make_core(kv_cache_memory="18MiB", enable_prefix_caching=enable_prefix_caching)
    assert generate(core, prompts, GREEDY, range(16)) == together
    assert core.stats.num_preemptions > 0
    assert core.stats.kv_cache_usage_perc == 0


def test_seeded_samples_alone_and_in_a_batch_of_16(prompts: list[list[int]]) -> None:
    sampled_alone = generate_alone(prompts, SAMPLED, [0, 3])
    sampled_together = generate(make_core(), prompts, SAMPLED, range(16))
    assert {key: sampled_together[key] for key in sampled_alone} == sampled_alone
    assert sampled_alone[0, 0] != sampled_alone[0, 1]
