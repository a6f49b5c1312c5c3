"""Every rank holds its share of the weights and no more: with all of them the tokens would be right, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.gguf_file import write_gguf
from tests.helpers.rank_memory import VOCAB_SIZE

ROOT = Path(__file__).parents[3]
SIZE = 3

PACKED = 0.7
"""The part of the weights that is in memory at least: the table is read where it is looked up."""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "int4", "none"])
def test_resident_memory_is_what_the_plan_says(quant: str, tmp_path: Path) -> None:
    sizes = {"embedding_length": 48, "head_count": 3, "head_count_kv": 3, "feed_forward_length": 48}
    tiny = write_gguf(
        tmp_path / "tiny.gguf", tensors={"token_embd.weight": np.zeros((VOCAB_SIZE, 48), np.float32)}, **sizes
    )
    command = [sys.executable, "-m", "tests.helpers.rank_memory", str(tiny), "llama", quant, str(SIZE)]
    variables = os.environ | {"OMP_WAIT_POLICY": "passive"}
    # The first start parses the weights, in memory of which a little stays with the process.
    for _ in range(2):
        printed = subprocess.check_output(command, cwd=ROOT, env=variables, text=True)
    found = json.loads(printed.splitlines()[-1])
    planned = found["weights"] + found["copies"] + found["activations"] + found["kv_cache"]
    # The other ranks' weights would not go unseen.
    assert PACKED * SIZE * found["weights"] > 1.05 * planned
    for rank, grown in enumerate(found["grown"]):
        assert grown < 1.05 * planned, (rank, found)
        assert grown > PACKED * found["weights"], (rank, found)
