"""What several engines say of themselves, as one."""

from __future__ import annotations

from engine.core.stats import Load, joined
from engine.core.step_costs import StepCosts


def test_the_load_of_engines_that_share_requests() -> None:
    first, second = (
        Load(
            step_costs=StepCosts(step=seconds, prompt_token=seconds),
            decode_seconds=seconds,
            num_step_tokens=100,
            num_prompt_step_tokens=50,
            num_prefilled_tokens=7,
            num_slots=4,
            slot_seconds=seconds,
        )
        for seconds in (1.0, 3.0)
    )
    # A third one that has made no step yet has room all the same.
    load = joined([first, second, Load(num_slots=4)])
    assert load == Load(
        step_costs=StepCosts(step=2.0, prompt_token=2.0),
        decode_seconds=2.0,
        num_step_tokens=100,
        num_prompt_step_tokens=50,
        num_prefilled_tokens=14,
        num_slots=12,
        slot_seconds=2.0,
        num_engines=3,
    )
    assert joined([]) == Load()
