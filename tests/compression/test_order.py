"""The order of the algorithms, on small models that were trained as floats and have outlier channels."""

from __future__ import annotations

import math

import pytest

from tests.helpers.trained import VOCABULARY, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("order"))


def test_the_model_has_learnt(bench: Bench) -> None:
    uniform = math.log(VOCABULARY)
    true = bench.source.probabilities(bench.held_out[:, 1:], bench.held_out[:, :-1])
    learnt = bench.loss(bench.float_log_probs)
    assert (uniform - learnt) / (uniform - bench.loss(true.double().log())) > 0.3


def test_a_rotation_changes_nothing_by_itself(bench: Bench) -> None:
    # Weights are written as float16, which is off by 2**-12 of a weight.
    assert bench.divergence(bench.compressed("none", "hadamard")) < 1e-5


def test_calibration_beats_rounding_and_a_rotation_helps(bench: Bench) -> None:
    """rtn > awq, rtn > gptq > hadamard+gptq; limits are 1.4 times what the worst of three trainings gave, or more."""
    found = {
        algorithm: bench.compressed("int4:g128", algorithm)
        for algorithm in ("rtn", "awq", "gptq", "hadamard+rtn", "hadamard+gptq")
    }
    divergence = {algorithm: bench.divergence(log_probs) for algorithm, log_probs in found.items()}
    float_loss = bench.loss(bench.float_log_probs)
    loss = {algorithm: bench.loss(log_probs) - float_loss for algorithm, log_probs in found.items()}
    assert divergence["gptq"] < 0.7 * divergence["rtn"]
    assert divergence["awq"] < 0.4 * divergence["rtn"]
    assert divergence["hadamard+rtn"] < 0.5 * divergence["rtn"]
    assert divergence["hadamard+gptq"] < 0.7 * divergence["hadamard+rtn"]
    assert divergence["hadamard+gptq"] < 0.6 * divergence["gptq"]
    # A model that fits imperfectly may even gain: what is lost is less certain than how far it is off.
    assert loss["rtn"] > 2 * max(loss["awq"], loss["gptq"], loss["hadamard+gptq"])
