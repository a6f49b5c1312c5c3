"""Forms, bans, allowed tokens and vectors of prompts have the bits of one rank, with shared layers and stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.executor.test_bans import make_requests as make_banning
from tests.executor.test_embeddings import assert_same, embed
from tests.executor.test_embeddings import make_requests as make_embeddings
from tests.helpers.forms import make_core, run
from tests.helpers.forms import make_requests as make_forms
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_the_bits_of_one_rank(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "model"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    alone = make_core(path, quant="int8")
    drawn, vectors = run(alone, make_banning()), embed(alone, make_embeddings())
    formed = run(alone, make_forms())
    core = make_core(path, quant="int8", max_num_batched_tokens=16, **options)
    try:
        assert run(core, make_banning()) == drawn
        assert run(core, make_forms()) == formed
        assert_same(embed(core, make_embeddings()), vectors)
    finally:
        core.close()
