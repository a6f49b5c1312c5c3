"""A compressed model is served compressed: no copy of its weights as floats stays, and no second one as stored."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.models.config import ModelConfig
from engine.models.shapes import tensor_shape
from tests.helpers.serving_memory import MAX_TOKENS, NUM_REQUESTS

ALLOWANCE = 96 * 2**20
"""Besides weights and KV cache: a step's activations, which the plan puts at 45 MiB, tables, tokenizer and code."""

ROOT = Path(__file__).parents[2]


def linear_parameters() -> int:
    """Of the layers' matrices."""
    checkpoint = open_checkpoint(resolve_model("llama"))
    config = ModelConfig.from_dict(checkpoint.config)
    names = [name for name in checkpoint.names() if name.endswith("_proj.weight")]
    return sum(math.prod(tensor_shape(config, name)) for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    "quant",
    ["int4", *(pytest.param(quant, marks=pytest.mark.slow) for quant in ("int8", "nf4", "codebook4"))],
)
def test_no_copy_of_the_weights_stays(quant: str) -> None:
    # Half of what a copy of the layers' matrices as bfloat16 takes, a quarter of one as float32.
    assert linear_parameters() > ALLOWANCE
    child = subprocess.run(
        [sys.executable, "-m", "tests.helpers.serving_memory", "llama", quant],
        cwd=ROOT,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["num_tokens"] == sum(1 + index % MAX_TOKENS for index in range(NUM_REQUESTS))
    expected = found["weights"] + found["kv_cache"]
    assert expected < found["growth"] + ALLOWANCE, "less than what is planned: is this the right process?"
    assert found["growth"] < expected + ALLOWANCE, found
