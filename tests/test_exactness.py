"""Quantized logits do not depend on the batch, to the bit: prefills, decodes and both together."""

from __future__ import annotations

import random
from typing import Literal

import pytest
import torch

from engine.batch import Batch, BatchRow, Draw
from engine.config import EngineConfig
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.runner import ModelRunner
from engine.sampling.params import SamplingParams

NUM_SEQUENCES = 24
"""More than the C product takes at once, so that both of its bodies take part."""

DRAW = Draw(SamplingParams(temperature=0), seed=0, index=0, position=0)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_logits_are_equal_alone_and_in_any_batch(quant: Literal["int8", "int4"]) -> None:
    config = EngineConfig(quant=quant, device="cpu", kv_cache_memory="128MiB")
    runner = ModelRunner(config, open_checkpoint(resolve_model("llama")))
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 49000) for _ in range(rng.randrange(5, 60))] for _ in range(NUM_SEQUENCES)]
    tables = [[4 * i + j for j in range(1, 5)] for i in range(NUM_SEQUENCES)]
    prefills = [BatchRow(prompts[i], 0, 0, tables[i], DRAW) for i in range(NUM_SEQUENCES)]
    decodes = [BatchRow([7], len(prompts[i]), 0, tables[i], DRAW) for i in range(NUM_SEQUENCES)]

    def logits(rows: list[BatchRow]) -> torch.Tensor:
        with torch.inference_mode():
            return runner.execute(Batch(rows))

    prefilled = torch.cat([logits([row]) for row in prefills])
    assert torch.equal(logits(prefills), prefilled)
    decoded = torch.cat([logits([row]) for row in decodes])
    for size in (2, 5, 16, 17, NUM_SEQUENCES):
        assert torch.equal(logits(decodes[:size]), decoded[:size])
    mixed = logits([prefills[0], *decodes[1:9]])
    assert torch.equal(mixed, torch.cat((prefilled[:1], decoded[1:9])))
