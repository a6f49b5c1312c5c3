"""Random requests with the default model: every row of logits and every token is that of the request alone."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig
from engine.kernels import cpu
from engine.loading.resolve import resolve_model
from engine.quality.invariants import Trial, promise


@pytest.mark.skipif(cpu.library() is None, reason="torch's operators promise less")
@pytest.mark.parametrize(
    ("num_requests", "quant"),
    [
        (50, "int8"),
        pytest.param(500, "int8", marks=pytest.mark.slow),
        pytest.param(500, "int4", marks=pytest.mark.slow),
        pytest.param(50, "none", marks=pytest.mark.slow),
    ],
)
def test_requests_in_company_are_those_alone(num_requests: int, quant: str) -> None:
    config = EngineConfig.from_options(model="llama", quant=quant, device="cpu")
    trial = Trial(config, resolve_model("llama"), num_requests)
    is_promised, kernels = promise(config, trial.alone.runner)
    assert is_promised
    comparison = trial.run(quiet=True)
    print(
        f"{kernels}: {comparison.num_rows} rows, {comparison.num_preemptions} preemptions, {comparison.exercised}"
    )
    assert comparison.differences == []
    assert comparison.missing() == []
    assert len(trial.record.tokens) > num_requests
