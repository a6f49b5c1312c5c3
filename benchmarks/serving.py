"""Benchmark a server over streamed /v1/completions: `python -m benchmarks.serving --help`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.client import CompletionsClient, ServerError
from benchmarks.machine import describe_run
from benchmarks.metrics import DEFINITIONS, RequestRecord, summarize
from benchmarks.prompts import PromptMaker
from benchmarks.report import format_summary, record_to_json, write_json
from benchmarks.scenarios import SCENARIOS, PlannedRequest, Scenario, TraceError, WorkloadOptions

_CALIBRATION_WORDS = 256
_SHOWN_ERRORS = 3


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    defaults = WorkloadOptions()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Benchmark an OpenAI-compatible server over streamed /v1/completions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # "--api-k KEY" would escape the masking of the recorded arguments
    )
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="the server, with or without /v1")
    add("--model", help="model name (default: the first that the server lists)")
    add("--api-key", help="sent as a bearer token, never recorded")
    add(
        "--scenario",
        action="append",
        choices=list(SCENARIOS),
        help="may be repeated (default: all, trace only with --trace)",
    )
    add("--num-requests", type=positive_int, help="requests a scenario (default: the scenario's own number)")
    add("--input-tokens", type=positive_int, default=defaults.input_tokens, help="prompt length, about")
    add("--output-tokens", type=positive_int, default=defaults.output_tokens, help="tokens to generate")
    add(
        "--long-input-tokens",
        type=positive_int,
        default=defaults.long_input_tokens,
        help="prompt length of long-prefill",
    )
    add(
        "--shared-prefix-tokens",
        type=positive_int,
        default=defaults.shared_prefix_tokens,
        help="what the prompts of shared-prefix have in common, before their own --input-tokens",
    )
    add("--trace", type=Path, help="CSV with columns TIMESTAMP,ContextTokens,GeneratedTokens")
    add("--trace-requests", type=positive_int, help="rows of the trace to replay (default: all)")
    add("--trace-speedup", type=positive_float, default=defaults.trace_speedup, help="below 1 slows down")
    add("--trace-max-context", type=positive_int, help="cut longer contexts of the trace to this")
    add("--seed", type=int, default=0, help="of the prompts' words")
    add("--no-ignore-eos", action="store_true", help="do not send ignore_eos; outputs may then end early")
    add("--output", type=Path, help="write everything as JSON to this file")
    return parser.parse_args(arguments)


def positive_int(text: str) -> int:
    """An argparse type: an integer above 0."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a number above 0."""
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


async def calibrate(client: CompletionsClient, seed: int, salt: int) -> float:
    """Tokens per word of our prompts under the server's tokenizer, measured with one short request.

    Raises:
        ServerError: If that request fails.
    """
    prompt = PromptMaker(seed, salt).make(_CALIBRATION_WORDS)
    record = await client.complete(PlannedRequest(prompt, max_tokens=1))
    if record.error is not None:
        raise ServerError(f"the first request failed: {record.error}")
    return record.input_tokens / _CALIBRATION_WORDS


async def run_scenario(client: CompletionsClient, scenario: Scenario) -> tuple[list[RequestRecord], float]:
    """Run one scenario; returns its records and the client's CPU seconds per second of the run.

    If the warm-up request fails, its record is the only one.
    """
    warm_up = await client.complete(scenario.warm_up)
    if warm_up.error is not None:
        return [warm_up], 0.0
    with tqdm(total=len(scenario.requests), desc=scenario.name, unit="req", leave=False) as progress:
        start, cpu_start = time.perf_counter(), time.process_time()
        records = await client.run(scenario.requests, scenario.concurrency, progress.update)
        cpu_share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
    return records, cpu_share


def _title(scenario: Scenario) -> str:
    sending = "at arrival times" if scenario.concurrency is None else f"{scenario.concurrency} at a time"
    parameters = ", ".join(
        f"{name} {value}" for name, value in scenario.parameters.items() if value is not None
    )
    return f"{scenario.name} ({sending}; {parameters})".replace("_", " ")


def _print_errors(records: Sequence[RequestRecord]) -> None:
    errors = list(dict.fromkeys(record.error for record in records if record.error is not None))
    for error in errors[:_SHOWN_ERRORS]:
        print(f"  failed: {error}")
    if len(errors) > _SHOWN_ERRORS:
        print(f"  ... and {len(errors) - _SHOWN_ERRORS} other reasons")


async def run_benchmark(options: argparse.Namespace, result: dict[str, Any]) -> int:
    """Run the chosen scenarios, print each when it ends, fill `result`; returns the number of failures."""
    names = options.scenario or [name for name in SCENARIOS if name != "trace" or options.trace]
    workload = WorkloadOptions(
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        num_requests=options.num_requests,
        long_input_tokens=options.long_input_tokens,
        shared_prefix_tokens=options.shared_prefix_tokens,
        trace=options.trace,
        trace_requests=options.trace_requests,
        trace_speedup=options.trace_speedup,
        trace_max_context=options.trace_max_context,
    )
    salt = time.time_ns()
    num_failed = 0
    async with CompletionsClient(
        options.base_url, options.model, options.api_key, ignore_eos=not options.no_ignore_eos
    ) as client:
        model = await client.find_model()
        tokens_per_word = await calibrate(client, options.seed, salt)
        result |= {"base_url": options.base_url, "model": model, "seed": options.seed, "salt": salt}
        result |= {"tokens_per_word": tokens_per_word, "scenarios": []}
        print(f"{model} at {options.base_url}\n\n{DEFINITIONS}")
        prompts = PromptMaker(options.seed, salt + 1, tokens_per_word)
        for scenario in [SCENARIOS[name](workload, prompts) for name in names]:
            records, cpu_share = await run_scenario(client, scenario)
            summary = summarize(records)
            print(f"\n{format_summary(_title(scenario), summary)} | client used {cpu_share:.0%} of a core")
            _print_errors(records)
            num_failed += summary.num_failed
            result["scenarios"].append(
                {
                    "name": scenario.name,
                    "concurrency": scenario.concurrency,
                    "parameters": scenario.parameters,
                    "client_cpu_share": cpu_share,
                    "summary": asdict(summary),
                    "requests": [record_to_json(record) for record in records],
                }
            )
    return num_failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every request succeeded, 1 if one failed, 2 if none could be sent."""
    options = parse_arguments(arguments)
    result = {"benchmark": "serving"} | describe_run(sys.argv[1:] if arguments is None else arguments)
    try:
        num_failed = asyncio.run(run_benchmark(options, result))
    except (ServerError, TraceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output is not None:
        write_json(options.output, result)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
