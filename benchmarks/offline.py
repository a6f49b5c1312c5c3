"""Timed runs of `LLM.generate`: how long a batch's prefill and its decode take."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.prompts import WORDS
from engine import LLM, SamplingParams

DEFINITIONS = """\
prefill   input tokens / time of a run that generates one token a prompt
decode    output tokens after each prompt's first / (time of the full run - time of the prefill run)
total     (input + output tokens) / time of the full run
step      time of one decode step: the time between two tokens of one prompt
x         median over repetitions of the ratio to the first variant in the same repetition"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One repetition: the same number of fresh prompts, once for one token and once for all.

    Attributes:
        num_prompts: Prompts in the batch.
        input_tokens, output_tokens: Tokens a prompt; output at least 2.
        prefill_seconds: Time of the run that generates one token a prompt.
        full_seconds: Time of the run that generates `output_tokens` a prompt.
    """

    num_prompts: int
    input_tokens: int
    output_tokens: int
    prefill_seconds: float
    full_seconds: float

    @property
    def decode_seconds(self) -> float:
        """What the full run took beyond the prefill."""
        return self.full_seconds - self.prefill_seconds

    @property
    def step_seconds(self) -> float:
        """Time of one decode step."""
        return self.decode_seconds / (self.output_tokens - 1)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.num_prompts * self.input_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second after each prompt's first."""
        return self.num_prompts / self.step_seconds

    @property
    def total_rate(self) -> float:
        """Prompt and generated tokens per second of the full run."""
        return self.num_prompts * (self.input_tokens + self.output_tokens) / self.full_seconds


class TokenPrompts:
    """Seeded prompts of exact length, as token ids of ordinary words; no two are equal.

    Args:
        llm: Its tokenizer turns the words into ids, in one short request that warms the engine up as well.
    """

    def __init__(self, llm: LLM, seed: int) -> None:
        [output] = llm.generate(
            [" ".join(WORDS)], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False
        )
        self._ids = output.prompt_token_ids[1:]  # the first may be a begin-of-sequence token
        self._random = random.Random(seed)

    def make(self, num_prompts: int, num_tokens: int) -> list[list[int]]:
        """`num_prompts` prompts of `num_tokens` ids each."""
        return [self._random.choices(self._ids, k=num_tokens) for _ in range(num_prompts)]


def generate_seconds(llm: LLM, prompts: Sequence[Sequence[int]], output_tokens: int) -> float:
    """Time of one greedy `generate` of exactly `output_tokens` tokens a prompt.

    Raises:
        RuntimeError: If a prompt got fewer tokens, because it does not fit the model's context.
    """
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    for output in outputs:
        generated = len(output.outputs[0].token_ids)
        if generated != output_tokens:
            reason = output.error or output.outputs[0].finish_reason
            raise RuntimeError(f"a prompt got {generated} of {output_tokens} tokens ({reason})")
    return seconds


def measure(
    llm: LLM,
    prefill_prompts: Sequence[Sequence[int]],
    full_prompts: Sequence[Sequence[int]],
    output_tokens: int,
) -> Measurement:
    """One repetition on one engine.

    Args:
        prefill_prompts, full_prompts: As many prompts of the same length, none of which the engine has seen
            (its prefix cache would answer).
        output_tokens: Tokens a prompt in the full run, at least 2.
    """
    prefill_seconds = generate_seconds(llm, prefill_prompts, output_tokens=1)
    full_seconds = generate_seconds(llm, full_prompts, output_tokens)
    return Measurement(len(full_prompts), len(full_prompts[0]), output_tokens, prefill_seconds, full_seconds)
