"""What the start compiles is all that serving launches: recorded from the engine's own code, on the meta device."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core.batch import Batch, BatchRow, Draw, Pool, Scoring
from engine.core.sampling_params import SamplingParams
from engine.errors import ConfigError
from engine.executor.triton_executor import TritonExecutor
from engine.executor.warmup import make_meta_executor, record_launches, warm_up
from engine.kernels.launch import TARGETS, Launch, recording
from tests.helpers.tiny import TINY_CONFIGS

PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.5, min_p=0.1, logprobs=4),
    SamplingParams(repetition_penalty=1.2, logit_bias={3: 1.0}, logprobs=0),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma: two windows, norms of heads; a config.json is all that is needed."""
    path = tmp_path_factory.mktemp("warmup")
    TINY_CONFIGS["gemma3"].save_pretrained(path)
    return path


def random_batch(source: random.Random, executor: TritonExecutor) -> Batch:
    """Up to the limits: decodes alone, prompts alone, or both; some rows whose prompt goes on."""
    limits = executor.limits
    num_rows = source.choice([1, 2, 3, source.randint(1, limits.max_num_seqs)])
    share = limits.max_num_batched_tokens // num_rows
    kind = source.choice(["decode", "prompt", "mixed"])
    rows = []
    for slot in source.sample(range(limits.max_num_seqs), num_rows):
        is_decode = kind == "decode" or (kind == "mixed" and source.random() < 0.7)
        length = 1 if is_decode else source.randint(1, max(1, min(share, limits.max_model_len)))
        start = source.randint(0, limits.max_model_len - length)
        params = source.choice(PARAMS)
        mask = source.choice([None, bytes(4 * -(-executor.model.config.vocab_size // 32))])
        draw = Draw(params, 0, 0, 0, output_token_ids=(1, 2), allowed_tokens=mask)
        draw = draw if source.random() < 0.9 else None
        pool = Pool(source.choice(["last", "mean"]), source.random() < 0.5) if draw is None else None
        start = 0 if pool else start
        table = [1] * -(-(start + length) // executor.cache.block_size)
        first = source.randrange(length)
        is_scored = pool is None and source.random() < 0.3
        scoring = Scoring(1, first, [7] * (length - first), source.randint(0, 5)) if is_scored else None
        admission = source.randint(0, 10**9)
        rows.append(BatchRow([5] * length, start, 0, table, draw, slot, admission, pool, scoring))
    return Batch(rows)


def launches_of(executor: TritonExecutor, batch: Batch, arch: str) -> set[Launch]:
    with recording(TARGETS[arch]) as launches:
        executor.sample(executor.execute(batch), batch, [row.draw for row in batch.rows])
    return launches


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    "options",
    [
        {"quant": "none"},
        {"quant": "int8", "kv_cache_dtype": "int8"},
        {"quant": "int4", "kv_cache_dtype": "fp8_e4m3"},
        {"quant": "int8", "kv_cache_dtype": "int4"},
        {"quant": "int4", "deterministic": True},
        {"quant": "none", "deterministic": True, "dtype": "float32"},
    ],
)
def test_nothing_is_launched_that_the_start_has_not_compiled(
    model: Path, arch: str, options: dict[str, Any]
) -> None:
    config = EngineConfig(model=str(model), max_num_seqs=80, max_num_batched_tokens=1500, **options)
    with recording(TARGETS[arch]) as compiled:
        executor = make_meta_executor(config, TARGETS[arch])
        warm_up(executor, TARGETS[arch])
    assert compiled == record_launches(config, arch)
    source = random.Random(0)
    launched: set[Launch] = set()
    for _ in range(60):
        launched |= launches_of(executor, random_batch(source, executor), arch)
    assert launched <= compiled
    # The start compiles little that is never launched: what only other lengths would need.
    assert len(compiled - launched) <= 3


def test_a_launch_that_was_not_compiled_would_be_seen(model: Path) -> None:
    small = EngineConfig(model=str(model), quant="int4", max_num_seqs=8, max_num_batched_tokens=16)
    large = EngineConfig(model=str(model), quant="int4", max_num_seqs=8, max_num_batched_tokens=1024)
    assert record_launches(small, "sm_90") < record_launches(large, "sm_90")


def test_a_cache_type_that_a_chip_lacks_is_refused(model: Path) -> None:
    config = EngineConfig(model=str(model), kv_cache_dtype="fp8_e4m3")
    with pytest.raises(ConfigError, match="fp8_e4m3 needs an sm_89 or newer, this is sm_80"):
        record_launches(config, "sm_80")
