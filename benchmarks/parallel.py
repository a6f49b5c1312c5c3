"""How an engine scales over ranks: `python -m benchmarks.parallel --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import trange

from benchmarks.machine import describe_run
from benchmarks.offline import Measurement, TokenPrompts, measure
from benchmarks.report import format_table, write_json
from engine import LLM
from engine.errors import EngineError
from engine.parallel.costs import float_sum_bytes, gather_bytes, integer_sum_bytes
from engine.parallel.group import TensorGroup

DEFINITIONS = """\
tok/s       tokens decoded a second, median of the repetitions; x: its ratio to the first row's in the same repetition
step        time of one decode step
bytes       that rank 0 brought to exchanges in an average step, prefill steps included
exchanges   share of the time that rank 0 spent in them, waiting for the slowest rank included"""


@dataclass(frozen=True, slots=True)
class Scaling:
    """One repetition at one number of ranks.

    Attributes:
        num_bytes: That rank 0 brought to exchanges, in all.
        num_steps: Of the engine.
        exchange_seconds: Of the run's time.
    """

    measurement: Measurement
    num_bytes: int
    num_steps: int
    exchange_seconds: float

    @property
    def exchange_share(self) -> float:
        """Of the run's time, in exchanges."""
        total = self.measurement.prefill_seconds + self.measurement.full_seconds
        return self.exchange_seconds / total


@dataclass(frozen=True, slots=True)
class Machine:
    """What a model of a step is made of.

    Attributes:
        memory_bandwidth, link_bandwidth: Bytes a second that a rank reads, and that it sends.
        latency: Seconds that an exchange takes beside its bytes.
    """

    memory_bandwidth: float
    link_bandwidth: float
    latency: float


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, as far as a decode step's time depends on them."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def num_weights(self) -> int:
        """Of the layers and the head."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    @property
    def cached_numbers(self) -> int:
        """Keys and values of a token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


LLAMA_70B = Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256)


FORMS = ("integers", "gathered", "bf16")
"""What row-parallel layers exchange: two int32 sums, inputs and outputs in 16 bits, or sums in bf16."""


def link_bytes(shape: Shape, size: int, form: str) -> int:
    """Bytes that a rank sends for each token in a layer; activations are gathered in 16 bits."""
    total = 0
    for in_features in (shape.num_heads * shape.head_dim, shape.intermediate_size):
        if form == "integers":
            total += integer_sum_bytes(in_features, shape.hidden_size, size, terms=2)
        elif form == "gathered":
            total += gather_bytes(2 * (in_features + shape.hidden_size), size)
        else:
            total += float_sum_bytes(shape.hidden_size, size, item_bytes=2)
    return total


def model_step(
    shape: Shape, size: int, batch: int, context: int, form: str, machine: Machine
) -> tuple[float, float]:
    """Seconds of a decode step that waits for memory and links only, and of its exchanges; int8 weights.

    Args:
        context: Tokens of each sequence, with two bytes for each number of the cache.
    """
    read = (shape.num_weights + 2 * batch * context * shape.cached_numbers) / size
    exchanges = 0.0
    if size > 1:
        sent = batch * link_bytes(shape, size, form) / machine.link_bandwidth
        exchanges = shape.num_layers * (sent + (2 if form == "bf16" else 4) * machine.latency)
    return read / machine.memory_bandwidth + exchanges, exchanges


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parallel",
        description="Measure one model on several numbers of ranks side by side, and model larger ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="llama", help="as for engine.serve")
    add("--quant", default="int8", help="as for engine.serve")
    add("--size", action="append", type=int, help="tensor_parallel_size; may be repeated (default: 1 and 3)")
    add("--batch", action="append", type=int, help="prompts a batch; may be repeated (default: 1 and 8)")
    add("--input-tokens", type=int, default=64, help="prompt length")
    add("--output-tokens", type=int, default=32, help="tokens to generate, at least 2")
    add("--repetitions", type=int, default=3, help="of every measurement, sizes in turn")
    add(
        "--memory-bandwidth",
        type=float,
        default=0.7 * 3.35e12,
        help="modelled rank: bytes a second that it reads",
    )
    add(
        "--link-bandwidth",
        type=float,
        default=0.7 * 450e9,
        help="modelled rank: bytes a second that it sends",
    )
    add("--latency", type=float, default=10e-6, help="modelled rank: seconds of an exchange beside its bytes")
    add("--output", type=Path, help="write everything as JSON to this file")
    options = parser.parse_args(arguments)
    options.size, options.batch = options.size or [1, 3], options.batch or [1, 8]
    sizes = [*options.size, *options.batch, options.input_tokens, options.repetitions]
    if min(sizes) < 1 or options.output_tokens < 2:
        parser.error("every number must be at least 1, --output-tokens at least 2")
    return options


def measure_scaling(
    llm: LLM, prompts: TokenPrompts, batch: int, input_tokens: int, output_tokens: int
) -> Scaling:
    """One repetition on one engine."""
    group = llm.core.model.runner.place.group
    before = _counts(llm, group)
    fresh = [prompts.make(batch, input_tokens) for _ in range(2)]
    measurement = measure(llm, fresh[0], fresh[1], output_tokens)
    num_bytes, num_steps, seconds = (
        after - start for after, start in zip(_counts(llm, group), before, strict=True)
    )
    return Scaling(measurement, int(num_bytes), int(num_steps), seconds)


def _counts(llm: LLM, group: TensorGroup) -> tuple[int, int, float]:
    return sum(group.num_bytes.values()), llm.core.stats.num_steps, group.seconds


def format_scaling(runs: dict[int, list[Scaling]]) -> str:
    """A row a number of ranks."""
    first = next(iter(runs.values()))
    rows = []
    for size, repetitions in runs.items():
        rates = [run.measurement.decode_rate for run in repetitions]
        ratios = [rate / base.measurement.decode_rate for rate, base in zip(rates, first, strict=True)]
        rows.append(
            [
                str(size),
                f"{median(rates):.1f}",
                f"{median(ratios):.2f}x",
                f"{median(run.measurement.step_seconds for run in repetitions) * 1e3:.1f}",
                f"{median(run.num_bytes / run.num_steps for run in repetitions):,.0f}",
                f"{median(run.exchange_share for run in repetitions):.0%}",
            ]
        )
    return format_table(["ranks", "tok/s", "x", "step ms", "bytes", "exchanges"], rows)


def format_model(machine: Machine) -> str:
    """Llama-3.1-70B with int8 weights: a row a number of ranks, batch and form of exchange."""
    rows = []
    for batch in (1, 16, 64, 256):
        for size, form in ((1, "none"), *((8, form) for form in FORMS)):
            step, exchanges = model_step(LLAMA_70B, size, batch, 2048, form, machine)
            numbers = [f"{batch / step:,.0f}", f"{step * 1e3:.2f}", f"{exchanges / step:.0%}"]
            rows.append([f"{batch}", str(size), form, *numbers])
    return format_table(["batch", "ranks", "exchange", "tok/s", "step ms", "exchanges"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if it ran to the end, 2 if the engine refused."""
    options = parse_arguments(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {"benchmark": "parallel"} | describe_run(given)
    engines: dict[int, LLM] = {}
    try:
        for size in options.size:
            engines[size] = LLM(model=options.model, quant=options.quant, tensor_parallel_size=size)
            prompts = TokenPrompts(engines[size], seed=0)
        print(
            f"\n{options.model}, --quant {options.quant}, {options.input_tokens} input tokens\n{DEFINITIONS}"
        )
        for batch in options.batch:
            runs: dict[int, list[Scaling]] = {size: [] for size in engines}
            for _ in trange(options.repetitions, desc=f"batch of {batch}", unit="repetition", leave=False):
                for size, llm in engines.items():
                    runs[size].append(
                        measure_scaling(llm, prompts, batch, options.input_tokens, options.output_tokens)
                    )
            print(f"\nbatch of {batch}\n{format_scaling(runs)}")
            result[f"batch-{batch}"] = {size: [asdict(run) for run in some] for size, some in runs.items()}
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        for llm in engines.values():
            llm.core.close()
    machine = Machine(options.memory_bandwidth, options.link_bandwidth, options.latency)
    print(
        f"\nMODELLED, not measured: {LLAMA_70B.name}, int8 weights, 2,048 tokens a sequence, ranks that read "
        f"{machine.memory_bandwidth / 1e12:.2f} TB/s, send {machine.link_bandwidth / 1e9:.0f} GB/s and take "
        f"{machine.latency * 1e6:.0f} us an exchange (assumed: no H100 was there to measure); arithmetic "
        f"is taken to hide behind reading\n{format_model(machine)}"
    )
    if options.output is not None:
        write_json(options.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
