"""What the log-probabilities of a prompt cost beside computing it: `python -m benchmarks.prompt_logprobs --help`.

A server of ours gets prompts that it has never seen, one at a time: as they are, with `echo` and `logprobs: 1`, and
with `prompt_logprobs: 1`, in turns, one token drawn of each.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.machine import describe_run
from benchmarks.report import format_table, write_json
from benchmarks.servers import process_tree, processor_seconds, running_engine

BAR = 1.3
"""Times the prefill alone."""

KINDS: dict[str, dict[str, Any]] = {
    "prefill alone": {},
    "echo, logprobs: 1": {"echo": True, "logprobs": 1},
    "prompt_logprobs: 1": {"prompt_logprobs": 1},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table. Returns the exit status: 1 if the bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama", help="what is served (default: %(default)s)")
    parser.add_argument("--quant", default="int8", help="its weights (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prompt (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="prompts of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    options = parser.parse_args(arguments)
    found = asyncio.run(_measure(options))
    alone = found["prefill alone"]
    rows = [
        [
            kind,
            f"{median(of_kind['seconds']):.2f}",
            f"{median(of_kind['seconds']) / median(alone['seconds']):.2f}",
            f"{median(of_kind['processor_seconds']):.2f}",
            f"{median(of_kind['processor_seconds']) / median(alone['processor_seconds']):.2f}",
            f"{of_kind['peak_mib'][0]:.0f}",
        ]
        for kind, of_kind in found.items()
    ]
    print(format_table([f"{options.tokens} tokens", "s", "times", "CPU s", "times", "MiB so far"], rows))
    if options.output is not None:
        write_json(options.output, {**describe_run(sys.argv), "results": found})
    times = [median(of_kind["seconds"]) / median(alone["seconds"]) for of_kind in found.values()]
    return int(max(times) > BAR)


async def _measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """By kind: wall time and the server's processor time of each prompt, and the memory of the first one."""
    numbers = random.Random(0)
    found: dict[str, dict[str, list[float]]] = {
        kind: {"seconds": [], "processor_seconds": [], "peak_mib": []} for kind in KINDS
    }
    server_options = ["--model", options.model, "--quant", options.quant]
    async with (
        running_engine("engine", server_options) as server,
        httpx.AsyncClient(base_url=server.base_url, timeout=600) as client,
    ):
        assert server.pid is not None
        pids = process_tree(server.pid)
        for is_counted in [False] + [True] * options.repeat:
            for kind, fields in KINDS.items():
                # No tokens of special meaning, nor any that the model's vocabulary lacks.
                prompt = [numbers.randrange(100, 10_000) for _ in range(options.tokens)]
                began, before = time.perf_counter(), processor_seconds(pids)
                response = await client.post(
                    "/v1/completions", json={"prompt": prompt, "max_tokens": 1, **fields}
                )
                response.raise_for_status()
                seconds, used = time.perf_counter() - began, processor_seconds(pids) - before
                if is_counted:
                    found[kind]["seconds"].append(seconds)
                    found[kind]["processor_seconds"].append(used)
                else:
                    found[kind]["peak_mib"].append(_peak_memory(pids))
    return found


def _peak_memory(pids: Iterable[int]) -> float:
    """The most MiB that the processes have held so far, those that several hold counted for each."""
    lines = (line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    sys.exit(main())
