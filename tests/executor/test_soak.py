"""Random requests: every row of logits and every token is that of the request alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.kernels import cpu
from engine.loading.resolve import resolve_model
from engine.quality.invariants import Trial, promise
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint


@pytest.mark.skipif(cpu.library() is None, reason="torch's operators promise less")
@pytest.mark.parametrize(
    ("num_requests", "model", "quant"),
    [
        # Two kinds of attention, norms of heads; the default model's shapes are in tests/executor/test_invariance.py.
        (50, "gemma3", "int8"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in [(500, "llama", "int8"), (500, "llama", "int4"), (50, "llama", "none")]
        ),
    ],
)
def test_requests_in_company_are_those_alone(
    num_requests: int, model: str, quant: str, tmp_path: Path
) -> None:
    if model in TINY_CONFIGS:
        tiny = deepcopy(TINY_CONFIGS[model])
        tiny.max_position_embeddings = 1024
        write_checkpoint(tmp_path, tiny)
        model = str(tmp_path)
    config = EngineConfig.from_options(model=model, quant=quant, device="cpu")
    trial = Trial(config, resolve_model(model), num_requests)
    is_promised, kernels = promise(config, trial.alone.runner)
    assert is_promised
    comparison = trial.run(quiet=True)
    print(
        f"{kernels}: {comparison.num_rows} rows, {comparison.num_preemptions} preemptions, {comparison.exercised}"
    )
    assert comparison.differences == []
    assert comparison.missing() == []
    assert len(trial.record.tokens) > num_requests
