"""What steps cost, learned from steps whose costs are known."""

from __future__ import annotations

import random

import pytest

from engine.core.step_costs import StepCostModel, StepCosts, StepSize

TRUE = StepCosts(step=4e-3, prompt_token=5e-4, decode=8e-4, read=2e-8)


def some_size(rng: random.Random) -> StepSize:
    num_decodes = rng.randrange(1, 40)
    num_prompt_tokens = rng.choice([0, 0, rng.randrange(16, 512)])
    start = rng.randrange(4000)
    num_reads = sum(rng.randrange(2000) for _ in range(num_decodes)) + num_prompt_tokens * start
    return StepSize(num_prompt_tokens, num_decodes, num_reads)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_predictions_come_near_what_steps_take(noise: float) -> None:
    rng, model = random.Random(1), StepCostModel()
    for _ in range(400):
        size = some_size(rng)
        model.observe(size, TRUE.seconds(size) * (1 + noise * (2 * rng.random() - 1)))
    sizes = [some_size(rng) for _ in range(50)]
    for size in sizes:
        assert model.costs.seconds(size) == pytest.approx(TRUE.seconds(size), rel=0.02 + noise / 2)


def test_prices_of_prompts_outlast_a_time_without_any() -> None:
    rng, model = random.Random(2), StepCostModel()
    for _ in range(400):
        size = some_size(rng)
        model.observe(size, TRUE.seconds(size))
    for number in range(100_000):
        decodes = StepSize(0, 1 + number % 7, 1000 + 13 * number % 4000)
        model.observe(decodes, TRUE.seconds(decodes))
    prompt = StepSize(512, 4, 100_000)
    assert model.costs.seconds(prompt) == pytest.approx(TRUE.seconds(prompt), rel=0.1)


def test_one_step_that_was_held_up_changes_little_and_a_slower_machine_all() -> None:
    model = StepCostModel()
    size = StepSize(0, 10, 5000)
    for _ in range(100):
        model.observe(size, 0.02)
    model.observe(size, 10.0)
    assert model.costs.seconds(size) == pytest.approx(0.02, rel=0.1)
    for _ in range(600):
        model.observe(size, 0.1)
    assert model.costs.seconds(size) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("start", [0, 3000])
def test_the_tokens_that_fit_a_time_take_it(start: int) -> None:
    num_tokens = TRUE.num_prompt_tokens(0.25, start)
    reads = num_tokens * start + num_tokens**2 // 2
    seconds = TRUE.seconds(StepSize(num_tokens, 0, reads)) - TRUE.step
    assert seconds == pytest.approx(0.25, rel=0.01)


def test_tiny_prices_are_no_trouble() -> None:
    assert StepCosts(prompt_token=1e-3, read=1e-22).num_prompt_tokens(0.1, 0) == 100
    assert StepCosts(prompt_token=5e-324).num_prompt_tokens(0.1, 0) > 2**30


def test_before_the_first_step_there_is_no_limit() -> None:
    assert StepCosts().num_prompt_tokens(0.1, 0) > 2**30
