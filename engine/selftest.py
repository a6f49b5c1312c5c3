"""python -m engine.selftest --invariants: proves on this machine, with this model, that a token's logits depend on
nothing but its request, to the bit.

See `engine.quality.invariants`. Other kernels and numbers of threads run in processes of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from engine.arguments import build_parser
from engine.cache_directory import caching_in
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.executor.cpu_executor import CpuExecutor
from engine.kernels import cpu
from engine.loading.resolve import resolve_model
from engine.quality.invariants import KINDS, NUM_REQUESTS, Trial, digests, promise, readable


def digests_elsewhere(arguments: Sequence[str], level: str | None = None) -> dict[str, list[str]]:
    """`digests` in a process of its own.

    Args:
        arguments: Options of the engine, as the command line has them.
        level: The CPU's kernels; None for those of this process.

    Raises:
        EngineError: It failed; the message is what it said last.
    """
    command = [sys.executable, "-m", "engine.selftest", "--digests", *arguments]
    environment = dict(os.environ) | ({} if level is None else {cpu.VARIABLE: level})
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise EngineError(
            result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no reason given"
        )
    found: dict[str, list[str]] = json.loads(result.stdout)
    return found


def check_invariants(config: EngineConfig, num_requests: int, arguments: Sequence[str]) -> bool:
    """Runs the comparisons and prints what came of them; whether all promises held."""
    path = resolve_model(config.model)
    trial = Trial(config, path, num_requests)
    runner = trial.alone.runner
    is_promised, kernels = promise(config, runner)
    threads = f", {torch.get_num_threads()} threads" if runner.device.type == "cpu" else ""
    cache = str(runner.cache_dtype).removeprefix("torch.")
    print(f"{config.model}, --quant {config.quant}, cache of {cache}; {kernels}{threads}\n")
    comparison = trial.run()
    is_equal, missing = not comparison.differences, comparison.missing(trial.longest)
    print(
        f"{_mark(is_equal, is_promised)}  in company as alone: {comparison.num_streams} streams, "
        f"{comparison.num_rows} rows of logits; {len(comparison.differences)} differ"
    )
    for difference in comparison.differences[:5]:
        print(f"         {difference}")
    print(f"         preemptions: {comparison.num_preemptions}")
    print(f"         tokens from the prefix cache: {comparison.num_cached_tokens}")
    for kind in KINDS:
        print(f"         {kind}: {comparison.exercised[kind]}")
    if missing:
        print(f"{_mark(False, is_promised)}  not exercised: {', '.join(missing)}")
    if not is_promised:
        print("\nno promise is made for this configuration")
        return True
    if isinstance(runner.executor, CpuExecutor):
        is_equal &= _compare_elsewhere(trial, arguments)
    print(f"\n{'PASS' if is_equal and not missing else 'FAIL'}")
    return is_equal and not missing


def _compare_elsewhere(trial: Trial, arguments: Sequence[str]) -> bool:
    """Whether other kernels of this processor, and another number of threads, bring the same."""
    loaded = cpu.library()
    assert loaded is not None
    # What is emulated is for tests, and what is portable is one of the others on a processor that has one.
    others = [name for name in ("amx", "vnni", "avx2") if cpu.LEVELS[name].needs <= cpu.processor_flags()]
    num_threads = 1 if torch.get_num_threads() > 1 else 2
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    runs: list[tuple[str, list[str], str | None]] = [
        (f"kernels for {name}", [], name) for name in others if name != loaded.level
    ]
    runs.append((threads, ["--num-threads", str(num_threads)], None))
    expected = readable(trial.record)
    is_equal = True
    for name, options, level in tqdm(runs, desc="Other kernels and threads", unit="run", leave=False):
        try:
            found = digests_elsewhere([*arguments, *options], level)
        except EngineError as error:
            is_equal = False
            tqdm.write(f"{_mark(False)}  {name}: {error}")
            continue
        num_rows = sum(key.count(" ") == 2 for key in found)
        num_differing = sum(expected[key][: len(values)] != values for key, values in found.items())
        is_good = num_rows > 0 and num_differing == 0
        tqdm.write(f"{_mark(is_good)}  {name}: {num_rows} rows of logits; {num_differing} differ")
        is_equal &= is_good
    for name in ("amx", "vnni", "avx2"):
        if name not in others:
            lacking = ", ".join(sorted(cpu.LEVELS[name].needs - cpu.processor_flags()))
            print(f"  --   kernels for {name}: this processor lacks {lacking}")
    return is_equal


def _mark(is_good: bool, is_promised: bool = True) -> str:
    return "  ok " if is_good else " FAIL" if is_promised else "  -- "


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the options and runs the test. Returns the exit status: 1 if a promise was broken."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    parser.prog = "python -m engine.selftest"
    parser.description = (
        "Test a model on this machine; takes a server's options, and those of its own are of no effect."
    )
    parser.add_argument(
        "--invariants",
        action="store_true",
        help="prove that logits do not depend on batch, chunks, cache, preemption, kernel and threads",
    )
    parser.add_argument(
        "--num-requests",
        type=int,
        default=NUM_REQUESTS,
        help="of the workload; with few of them not everything is exercised (default: %(default)s)",
    )
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    if not (options["invariants"] or options["digests"]):
        parser.error("nothing to test: give --invariants")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config = EngineConfig(
            **{option.name: options[option.name] for option in dataclasses.fields(EngineConfig)}
        )
        num_requests = max(1, options["num_requests"])
        with caching_in(config.cache_dir):
            if options["digests"]:
                print(json.dumps(digests(config, resolve_model(config.model), num_requests)))
                return 0
            passed_on = [word for word in arguments if word != "--invariants"]
            return 0 if check_invariants(config, num_requests, passed_on) else 1
    except EngineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
