"""The memory plan of a GPU, which takes no GPU: the arithmetic, the refusal, and the correction by a measurement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.memory import MemoryPlan, plan_memory
from engine.kernels.attention.kv_layer import INT4
from engine.models.config import ModelConfig
from tests.helpers.tiny import TINY_CONFIGS

MIB = 2**20
AVAILABLE = 2 * MIB + 900_000
"""Room for the weights and for fewer blocks than eight sequences could use."""

MODEL = ModelConfig.from_dict(TINY_CONFIGS["llama"].to_dict())


def plan(available: int, measured: int | None = None, **options: Any) -> MemoryPlan:
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, **options)
    cuda = torch.device("cuda")
    return plan_memory(config, MODEL, 2 * MIB, torch.bfloat16, cuda, available, measured)


def test_the_cache_takes_what_is_left() -> None:
    small = plan(AVAILABLE)
    assert not small.is_measured
    assert small.graphs > 0
    taken = small.weights + small.activations + small.graphs + small.kv_cache
    assert 0 <= AVAILABLE - taken < small.block
    assert plan(AVAILABLE, enforce_eager=True).graphs == 0


def test_what_cannot_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"2.1 MiB available - 2.0 MiB weights - .* CUDA graphs leave 0 B"):
        plan(2 * MIB + 100_000)


def test_a_measurement_takes_the_place_of_the_estimate_and_both_are_shown() -> None:
    estimate = plan(AVAILABLE)
    measured = replace(plan(AVAILABLE, estimate.activations + 40 * estimate.block), estimate=estimate)
    assert measured.num_blocks == estimate.num_blocks - 40
    assert str(measured).startswith(str(estimate))
    assert "estimated peak of a step" in str(measured)
    assert "measured peak of a step" in str(measured)


def test_heads_that_four_bits_cannot_hold_are_refused() -> None:
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64)
    model = replace(MODEL, head_dim=18)
    with pytest.raises(
        ConfigError, match="int4 needs heads of a multiple of 4 elements, this model's have 18"
    ):
        plan_memory(config, model, 0, INT4, torch.device("cpu"), 4 * MIB)


def test_a_quantized_cache_holds_more() -> None:
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64)
    blocks = {
        dtype: plan_memory(config, MODEL, 0, dtype, torch.device("cuda"), 4 * MIB).block
        for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn, INT4)
    }
    assert blocks[torch.float8_e4m3fn] * 2 == blocks[torch.bfloat16]
    # A scale of four bytes for each head of 16.
    assert blocks[torch.int8] * 16 == blocks[torch.float8_e4m3fn] * 20
    # Eight bytes of codes, and two halves for the one group.
    assert blocks[INT4] * 16 == blocks[torch.float8_e4m3fn] * 12


def test_tables_are_planned_for_what_the_cache_holds() -> None:
    """A context of 10^9 needs no room for tables that no sequence could use."""
    model = replace(ModelConfig.from_dict(TINY_CONFIGS["llama"].to_dict()), max_position_embeddings=10**9)
    for options in ({"kv_cache_memory": "16MiB"}, {}):
        config = EngineConfig(model="llama", **options)
        plan = plan_memory(config, model, 2**20, torch.float32, torch.device("cpu"), 2**33)
        assert plan.max_model_len <= plan.num_blocks * config.block_size
        # One token more would not fit, or its tables would not.
        longer = plan.max_model_len + config.block_size
        room = plan.available - plan.weights - plan.activations
        assert longer > plan.num_blocks * config.block_size or plan.kv_cache > room - plan.block
        assert plan.activations + plan.weights + plan.kv_cache <= plan.available
