"""Records what steps take, for tests that simulate an engine.

    python -m benchmarks.step_costs --output tests/api/step_costs.json

Runs requests of many lengths through an engine in this process, a few at a time and many, and writes of each step how
many tokens of prompts it computed, how many sequences decoded, how many keys all of these read, and its milliseconds.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.load import plan_requests
from benchmarks.machine import describe_run
from benchmarks.prompts import PromptMaker
from benchmarks.report import write_json
from engine import LLM, SamplingParams
from engine.core.step_costs import StepSize

BATCHES = (1, 4, 16, 32, 48)
"""Requests at a time."""


def record(model: str, seed: int) -> list[list[float]]:
    """What each step computed and took: as `StepSize` has it, and milliseconds."""
    steps: list[list[float]] = []
    rng, prompts = random.Random(seed), PromptMaker(seed, seed)
    with LLM(model, quant="int8", max_step_ms=150.0) as llm:
        costs = llm.core.scheduler.pace.model
        learn = costs.observe

        def observe(size: StepSize, seconds: float) -> None:
            steps.append([size.num_prompt_tokens, size.num_decodes, size.num_reads, round(1e3 * seconds, 2)])
            learn(size, seconds)

        costs.observe = observe  # type: ignore[method-assign]
        for number in BATCHES:
            planned = plan_requests(number, None, rng, prompts)
            params = [
                SamplingParams(max_tokens=min(200, one.max_tokens), temperature=0, ignore_eos=True)
                for one in planned
            ]
            llm.generate([one.prompt for one in planned], params, use_tqdm=False)
    return steps


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_costs", description=__doc__)
    parser.add_argument("--model", default="llama", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of lengths (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args(arguments)
    described = describe_run([])
    steps = record(options.model, options.seed)
    write_json(options.output, {"made_by": "python -m benchmarks.step_costs", **described, "steps": steps})
    print(f"{len(steps)} steps")


if __name__ == "__main__":
    main()
