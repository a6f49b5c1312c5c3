"""Logits are equal to the bit however a token was computed: batches, chunks, arrivals, preemption, cache, threads.

Tiny models of several families, of every weight and cache type, on the CPU's kernels.
"""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.core.request import Request
from engine.executor.cpu_executor import CpuExecutor
from engine.kernels import cpu
from engine.quality.invariants import PARAMS, Arrival, Comparison, RecordedCore, make_alone, make_arrivals
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="torch's operators promise less")

LONGEST = 320
"""Tokens of the longest sequence; attention has two segments there."""

VOCAB_SIZE = 320
MAX_REQUESTS = 24

SLOW = [("llama", "int8", "auto"), ("gemma3", "none", "int4")]
VARIANTS = [
    ("smollm2", "int4", "auto"),
    ("llama-biases", "none", "auto"),
    ("qwen3", "int8", "int8"),
    ("mistral", "int4", "float32"),
    ("gemma3", "int8", "float16"),
    ("qwen2-sliding", "none", "fp8_e4m3"),
    ("llama", "int8", "int4"),
    *SLOW,
]
"""Family, weights, cache: groups of two, three and four heads, norms of heads, windows, biases, ragged sizes."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Options of an engine that must not matter.

    Attributes:
        scarcity: 0 for a cache that holds everything, 1 for one that holds just the longest sequence.
        is_warm: The requests ran before on the same engine.
    """

    budget: int
    max_num_seqs: int
    threshold: int | None
    block_size: int
    scarcity: float
    caches_prefixes: bool
    is_warm: bool
    overlap: bool
    num_threads: int


LARGE_STEPS = Setting(200, 24, None, 16, 0.0, True, False, False, 2)
SCARCE_BLOCKS = Setting(24, 12, None, 16, 1.0, True, False, True, 1)
WARM_CACHE = Setting(64, 8, 40, 8, 0.0, True, True, False, 1)


@st.composite
def all_settings(draw: st.DrawFn) -> Setting:
    budget = draw(st.sampled_from([1, 2, 3, 5, 7, 16, 17, 40, 200]))
    return Setting(
        budget=budget,
        max_num_seqs=draw(st.integers(1, min(budget, 24))),
        threshold=draw(st.none() | st.sampled_from([1, 3, 16, 100])),
        block_size=draw(st.sampled_from([4, 16, 32])),
        scarcity=draw(st.sampled_from([0.0, 0.8, 1.0])),
        caches_prefixes=draw(st.booleans()),
        is_warm=draw(st.booleans()),
        overlap=draw(st.booleans()),
        num_threads=draw(st.integers(1, 2)),
    )


BEGINNINGS = [[random.Random(number).randrange(VOCAB_SIZE) for _ in range(LONGEST)] for number in range(2)]


@st.composite
def all_arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Requests that may share beginnings, few of them long."""
    arrivals = []
    for number in range(draw(st.integers(1, MAX_REQUESTS))):
        size = draw(st.integers(1, 20) | st.integers(1, 70) | st.integers(250, LONGEST - 20))
        shared = min(size, draw(st.sampled_from([0, 8, 33, LONGEST])))
        own = random.Random(number)
        prompt = BEGINNINGS[number % 2][:shared] + [own.randrange(VOCAB_SIZE) for _ in range(size - shared)]
        max_tokens = draw(st.integers(1, 20))
        params = replace(draw(st.sampled_from(PARAMS)), max_tokens=max_tokens, ignore_eos=True)
        request = Request(
            request_id=str(number),
            prompt_token_ids=prompt,
            params=params,
            seed=number,
            priority=draw(st.integers(0, 1)),
        )
        cancel_after = draw(st.none() | st.integers(1, max_tokens))
        arrivals.append(Arrival(request, draw(st.integers(0, 12)), cancel_after))
    return arrivals


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("exactness")
    for family, *_ in VARIANTS:
        config = deepcopy(TINY_CONFIGS[family])
        config.max_position_embeddings = LONGEST
        write_checkpoint(directory / family, config)
    return {family: directory / family for family, *_ in VARIANTS}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(one, marks=pytest.mark.slow if one in SLOW else (), id="-".join(one)) for one in VARIANTS],
)
def test_logits_do_not_depend_on_how_they_were_computed(
    checkpoints: dict[str, Path], variant: tuple[str, str, str]
) -> None:
    family, quant, cache_type = variant
    path = checkpoints[family]
    config = EngineConfig.from_options(
        model=str(path), quant=quant, kv_cache_dtype=cache_type, device="cpu", num_threads=1
    )
    alone = make_alone(config, path, LONGEST)
    assert isinstance(alone.runner.executor, CpuExecutor)
    comparison = Comparison()

    @settings(
        max_examples=4,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(all_arrivals(), all_settings())
    @example(make_arrivals(random.Random(0), MAX_REQUESTS, VOCAB_SIZE, LONGEST), LARGE_STEPS)
    @example(make_arrivals(random.Random(1), MAX_REQUESTS, VOCAB_SIZE, LONGEST), SCARCE_BLOCKS)
    @example(make_arrivals(random.Random(2), 12, VOCAB_SIZE, LONGEST), WARM_CACHE)
    def check(arrivals: list[Arrival], setting: Setting) -> None:
        crowded = make_crowded(alone, config, path, setting)
        expected = alone.run_alone(arrivals)
        for _ in range(1 + setting.is_warm):
            comparison.add(arrivals, expected, crowded.run(arrivals))
        assert crowded.core.stats.kv_cache_usage_perc == 0
        assert comparison.differences == []

    check()
    assert comparison.missing() == []
    assert comparison.num_rows > 1000


def make_crowded(alone: RecordedCore, config: EngineConfig, path: Path, setting: Setting) -> RecordedCore:
    plan = alone.runner.plan
    fewest = -(-LONGEST // setting.block_size)
    most = setting.max_num_seqs * fewest
    num_blocks = fewest + int((1.0 - setting.scarcity) * (most - fewest))
    return RecordedCore(
        config,
        path,
        max_model_len=LONGEST,
        max_num_batched_tokens=setting.budget,
        max_num_seqs=setting.max_num_seqs,
        long_prefill_token_threshold=setting.threshold,
        block_size=setting.block_size,
        kv_cache_memory=str((num_blocks + 1) * plan.block // plan.block_size * setting.block_size),
        enable_prefix_caching=setting.caches_prefixes,
        overlap=setting.overlap,
        num_threads=setting.num_threads,
    )
