"""Every rank holds its share of the weights and no more: with all of them the tokens would be right, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

from tests.tiny import TINY_CONFIGS, write_checkpoint

ROOT = Path(__file__).parent.parent.parent
SIZE = 3

BESIDES = 24 * 2**20
"""What a process with a larger model takes besides it: the vocabulary of its file, a longer program of calls, and the
holes that they leave in the allocator's memory."""

TOKENIZER = 32 * 2**20
"""Rank 0 has one."""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("quant", ["int8", pytest.param("none", marks=pytest.mark.slow)])
def test_resident_memory_is_what_the_plan_says(quant: str, tmp_path: Path) -> None:
    config = deepcopy(TINY_CONFIGS["smollm2"])
    config.intermediate_size = 96  # is shared by three
    write_checkpoint(tmp_path, config)
    child = subprocess.run(
        [sys.executable, "-m", "tests.parallel.rank_memory", str(tmp_path), "llama", quant, str(SIZE)],
        cwd=ROOT,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found = json.loads(child.stdout.splitlines()[-1])
    planned = found["weights"] + found["kv_cache"] + found["activations"]
    # The other ranks' weights would not go unseen.
    assert (SIZE - 1) * found["weights"] > 0.05 * planned + BESIDES + TOKENIZER
    for rank, grown in enumerate(found["grown"]):
        assert grown < 1.05 * planned + BESIDES + (0 if rank else TOKENIZER), (rank, found)
        # The packed matrices at least: the table is read where it is looked up.
        assert grown > 0.7 * found["weights"], (rank, found)
