"""How fast steps go: what that leaves of one for prompts, and what it says to those who wait."""

from __future__ import annotations

from collections.abc import Collection

from engine.config import SchedulerConfig
from engine.core.request import Sequence
from engine.core.stats import Load
from engine.core.step_costs import StepCostModel, StepSize

MIN_PROMPT_TOKENS = 16
"""Prompts get on by so many tokens in each step, whatever it takes."""

SLOT_TIME_KEPT = 0.999
"""What is left after each step of how long sequences have been seen to run."""


class Pace:
    """Learns from steps that have run.

    Attributes:
        model: What steps cost.
    """

    def __init__(self) -> None:
        self.model = StepCostModel()
        # Time that sequences ran, and how many of them have ended.
        self._slot_seconds, self._num_ends = 0.0, 0.0

    def observe(self, size: StepSize, seconds: float, num_running: int) -> None:
        """Takes in what a step has taken, beside so many sequences."""
        self.model.observe(size, seconds)
        self._slot_seconds = SLOT_TIME_KEPT * self._slot_seconds + seconds * num_running
        self._num_ends *= SLOT_TIME_KEPT

    def count_end(self) -> None:
        """Counts a sequence that ran and has ended."""
        self._num_ends += 1.0

    def num_prompt_tokens(self, config: SchedulerConfig, decodes: StepSize, start: int) -> int:
        """How many tokens of prompts a step may compute beside sequences that decode, by its time.

        Args:
            decodes: What these compute.
            start: How many tokens of the first prompt are computed.
        """
        costs = self.model.costs
        alone, slowdown = costs.seconds(decodes), config.max_step_slowdown
        if config.max_step_ms is not None:
            seconds = config.max_step_ms / 1000
        elif slowdown is not None:
            seconds = slowdown * alone
        else:
            return config.max_num_batched_tokens
        return max(MIN_PROMPT_TOKENS, costs.num_prompt_tokens(max(0.0, seconds - alone), start))

    def load(self, config: SchedulerConfig, running: Collection[Sequence], num_slots: int) -> Load:
        """What the time depends on that a request waits.

        Args:
            num_slots: Sequences that can run at a time.
        """
        decoding = [s for s in running if s.num_remaining_tokens <= 1]
        prefilling = [s for s in running if s.num_remaining_tokens > 1]
        decodes = StepSize(0, len(decoding), sum(s.num_computed_tokens for s in decoding))
        num_tokens = config.max_num_batched_tokens - len(decoding)
        if decoding:
            num_tokens = min(num_tokens, self.num_prompt_tokens(config, decodes, 0))
        return Load(
            step_costs=self.model.costs,
            decode_seconds=self.model.costs.seconds(decodes),
            num_step_tokens=max(1, num_tokens),
            num_prompt_step_tokens=max(1, min(num_tokens, config.long_prefill_token_threshold)),
            # Those with output are computed again, and nobody counts their prompts as waiting.
            num_prefilled_tokens=sum(s.num_computed_tokens for s in prefilling if not s.num_output_tokens),
            num_slots=num_slots,
            slot_seconds=self._slot_seconds / (self._num_ends + 1.0),
        )
