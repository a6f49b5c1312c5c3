"""The price of the second activation term: `python -m benchmarks.exactness --help`.

Sums in a fixed order cost nothing that could be left out: every kernel needs some order. What costs is the second
int8 term of the activations that are too large for the first one's scale, without which perplexity rises by 3 %. The
steps without it here have the same kernels and a scale a token that holds its largest element; they are as exact, and
further from the model's own numbers.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

from tqdm import tqdm

from benchmarks.prompts import WORDS
from benchmarks.report import format_table
from benchmarks.serving import positive_int
from engine.config import EngineConfig
from engine.core.batch import Batch, BatchRow
from engine.errors import EngineError
from engine.executor.cpu_executor import CpuExecutor
from engine.executor.runner import ModelRunner
from engine.executor.warmup import GREEDY, dummy_batch
from engine.kernels.operands import SparseInt8Format
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.quant import cpu_formats
from engine.tokenizer.tokenizer import load_tokenizer

ONE_TERM = SparseInt8Format(spread=math.inf)
"""One scale a token, which holds its largest element."""

BLOCK_SIZE = 16

DECODE_BAR, PREFILL_BAR = 0.03, 0.05
"""What the second term may cost, as a share of a step without it, at the KL divergence that it has now."""


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of one step: each `length` tokens behind `context` others that are in the cache."""

    title: str
    rows: int
    context: int
    length: int

    @property
    def bar(self) -> float:
        return DECODE_BAR if self.length == 1 else PREFILL_BAR


STEPS = (
    Step("A  1 stream, decode at 192", 1, 192, 1),
    Step("B  8 streams, decode at 192", 8, 192, 1),
    Step("C  32 streams, decode at 320", 32, 320, 1),
    Step("D  second half of a prefill of 1024", 1, 512, 512),
    Step("E  16 prompts, 32 tokens behind 512", 16, 512, 32),
)


def make_batch(runner: ModelRunner, step: Step, token_ids: list[int]) -> Batch:
    """The step, its context computed."""
    draw = dummy_batch([1], GREEDY).rows[0].draw
    num_blocks = -(-(step.context + step.length) // BLOCK_SIZE)
    rows = []
    for row in range(step.rows):
        table = [1 + row * num_blocks + block for block in range(num_blocks)]
        context = token_ids[row : row + step.context]
        runner.execute(Batch([BatchRow(context, 0, 0, table, draw, slot=row, admission=row)]))
        chunk = token_ids[row + step.context :][: step.length]
        rows.append(BatchRow(chunk, step.context, step.context, table, draw, slot=row, admission=row))
    return Batch(rows)


def seconds(runner: ModelRunner, batch: Batch) -> float:
    """Duration of a step without its draws."""
    start = time.perf_counter()
    runner.execute(batch)
    return time.perf_counter() - start


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exactness",
        description="Time a CPU's steps beside the same ones without the activations' second term, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="llama", help="as for engine.serve")
    parser.add_argument("--quant", choices=["int8", "int4"], default="int4", help="as for engine.serve")
    parser.add_argument("--repeat", type=positive_int, default=15, help="times that each step runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 2 if the model or its kernels are not there."""
    options = parse_arguments(arguments)
    config = EngineConfig(
        model=options.model,
        quant=options.quant,
        device="cpu",
        max_num_seqs=max(step.rows for step in STEPS),
        max_num_batched_tokens=512,
        block_size=BLOCK_SIZE,
        kv_cache_memory="512MiB",
    )
    try:
        path = resolve_model(options.model)
        runners = [ModelRunner(config, open_checkpoint(path))]
        with patch.object(cpu_formats, "CPU_ACTIVATIONS", ONE_TERM):
            runners.append(ModelRunner(config, open_checkpoint(path)))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not isinstance(runners[0].executor, CpuExecutor):
        print("error: the C kernels are not there; only they have such terms", file=sys.stderr)
        return 2
    text = " ".join(random.Random(0).choices(WORDS, k=1200))
    token_ids = load_tokenizer(path).encode(text)
    lines = []
    for step in tqdm(STEPS):
        batches = [make_batch(runner, step, token_ids) for runner in runners]
        turns = []
        for turn in range(options.repeat):
            pairs = list(zip(runners, batches, strict=True))
            times = [seconds(*pair) for pair in (pairs if turn % 2 else pairs[::-1])]
            turns.append(times if turn % 2 else times[::-1])
        two_terms, one_term = (median(times) * 1e3 for times in zip(*turns, strict=True))
        price = median(first / second for first, second in turns) - 1
        lines.append([step.title, f"{two_terms:.2f}", f"{one_term:.2f}", f"{price:.1%}", f"{step.bar:.0%}"])
    print("The price of the second activation term, and the bar for it at unchanged KL:")
    print(format_table(["step", "two terms ms", "one term ms", "price", "bar"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
