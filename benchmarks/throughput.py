"""Benchmark the engine offline, in this process: `python -m benchmarks.throughput --help`."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import trange

from benchmarks.machine import describe_run
from benchmarks.offline import DEFINITIONS, Measurement, TokenPrompts, measure
from benchmarks.profiling import format_operators, profile_phases
from benchmarks.report import format_table, write_json
from engine import LLM
from engine.errors import EngineError


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description="Benchmark offline generation; several --quant are measured side by side.",
    )
    add = parser.add_argument
    add("--model", default="llama", help="as for engine.serve (default: llama)")
    add("--quant", action="append", help="may be repeated; the first is what ratios refer to (default: none)")
    add(
        "--num-prompts", action="append", type=int, help="prompts a batch; may be repeated (default: 1 and 8)"
    )
    add("--input-tokens", type=int, default=128, help="prompt length (default: 128)")
    add("--output-tokens", type=int, default=128, help="tokens to generate, at least 2 (default: 128)")
    add("--repetitions", type=int, default=3, help="of every measurement, variants in turn (default: 3)")
    add("--seed", type=int, default=0, help="of the prompts (default: 0)")
    add(
        "--option",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="an option of the engine, e.g. --option num_threads 1; may be repeated",
    )
    add(
        "--profile",
        nargs="?",
        type=int,
        const=8,
        metavar="TOKENS",
        help="also print the operators of a prefill and of the decode of TOKENS tokens (default: 8)",
    )
    add("--output", type=Path, help="write everything as JSON to this file")
    options = parser.parse_args(arguments)
    options.quant = options.quant or ["none"]
    options.num_prompts = options.num_prompts or [1, 8]
    profiled = 1 if options.profile is None else options.profile
    sizes = [options.input_tokens, options.repetitions, profiled, *options.num_prompts]
    if min(sizes) < 1 or options.output_tokens < 2:
        parser.error("every number must be at least 1, --output-tokens at least 2")
    return options


def parse_option(text: str) -> Any:
    """The Python value that `text` writes ("512", "0.5", "True", "None"), or `text` itself ("512MiB")."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def run_workload(
    engines: dict[str, LLM], prompts: TokenPrompts, num_prompts: int, options: argparse.Namespace
) -> dict[str, list[Measurement]]:
    """Measure every engine `repetitions` times on the same prompts.

    The engines take turns within a repetition, so that a busy spell of the machine hits them alike.
    """
    measurements: dict[str, list[Measurement]] = {name: [] for name in engines}
    for _ in trange(options.repetitions, desc=f"batch of {num_prompts}", unit="repetition", leave=False):
        prefill_prompts = prompts.make(num_prompts, options.input_tokens)
        full_prompts = prompts.make(num_prompts, options.input_tokens)
        for name, llm in engines.items():
            measurements[name].append(measure(llm, prefill_prompts, full_prompts, options.output_tokens))
    return measurements


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``"median (min-max)"``."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the ratios within each repetition."""
    return median(value / base for value, base in zip(values, baseline, strict=True))


def format_workload(measurements: dict[str, list[Measurement]]) -> str:
    """A row a variant: rates as median (min-max), each with its ratio to the first variant."""
    rates: dict[str, Callable[[Measurement], float]] = {
        "prefill tok/s": lambda m: m.prefill_rate,
        "decode tok/s": lambda m: m.decode_rate,
        "total tok/s": lambda m: m.total_rate,
    }
    baseline = next(iter(measurements.values()))
    rows = []
    for name, runs in measurements.items():
        row = [name]
        for rate in rates.values():
            values = [rate(run) for run in runs]
            ratio = paired_ratio(values, [rate(run) for run in baseline])
            row += [spread(values), f"{ratio:.2f}x"]
        row += [
            f"{median(run.prefill_seconds for run in runs):.2f}",
            f"{median(run.decode_seconds for run in runs):.2f}",
            spread([run.step_seconds * 1e3 for run in runs]),
        ]
        rows.append(row)
    header = ["quant"]
    for name in rates:
        header += [name, "x"]
    return format_table([*header, "prefill s", "decode s", "step ms"], rows)


def run_benchmark(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Load every variant, measure all of them, print tables and fill `result`."""
    engine_options = {name: parse_option(value) for name, value in options.option}
    engines = {
        quant: LLM(model=options.model, quant=quant, **engine_options)
        for quant in dict.fromkeys(options.quant)
    }
    for llm in engines.values():  # each engine is warmed up; the prompts' tokens are the same for all
        prompts = TokenPrompts(llm, options.seed)
    parameters = {"input_tokens": options.input_tokens, "output_tokens": options.output_tokens}
    result |= {"model": options.model, "engine_options": engine_options, "seed": options.seed, **parameters}
    result["workloads"] = []
    print(
        f"\n{options.model}, {options.input_tokens} input and {options.output_tokens} output tokens a prompt"
    )
    print(f"rates are median (min-max) of {options.repetitions} repetitions\n\n{DEFINITIONS}")
    for num_prompts in options.num_prompts:
        measurements = run_workload(engines, prompts, num_prompts, options)
        print(f"\nbatch of {num_prompts}\n{format_workload(measurements)}")
        workload: dict[str, Any] = {
            "num_prompts": num_prompts,
            "measurements": {name: [asdict(run) for run in runs] for name, runs in measurements.items()},
        }
        if options.profile is not None:
            workload["operators"] = {}
            for name, llm in engines.items():
                make_prompts = partial(prompts.make, num_prompts, options.input_tokens)
                phases = profile_phases(llm, make_prompts, options.profile)
                for phase in phases:
                    print(f"\n{name}, batch of {num_prompts}, {format_operators(phase)}")
                workload["operators"][name] = [asdict(phase) for phase in phases]
        result["workloads"].append(workload)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if it ran to the end, 2 if the engine refused."""
    options = parse_arguments(arguments)
    result = {"benchmark": "throughput"} | describe_run(sys.argv[1:] if arguments is None else arguments)
    try:
        run_benchmark(options, result)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output is not None:
        write_json(options.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
