"""Long prompts that come beside streams: how much slower these go meanwhile, and how fast the prompts are computed.

    python -m benchmarks.long_prompts                 # three times 4 streams and two prompts of 7,000 tokens

Each round asks a server with the default bound on steps, one without a bound, and one without a bound whose chunks
have 512 tokens. Bars, of the medians of all rounds: the 95th percentile between two tokens of a stream is 5 times
what a token takes without the prompts, and the prompts have 0.7 times the tokens a second that they have in chunks
of 512.

Exit status 1: a bar was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from benchmarks.client import ServerError
from benchmarks.machine import describe_run
from benchmarks.metrics import RequestRecord
from benchmarks.prompts import PromptMaker
from benchmarks.report import format_table, write_json
from benchmarks.scenarios import PlannedRequest
from benchmarks.servers import Server, machine_seconds, process_tree, processor_seconds, running_engine

UNBOUNDED = ("--max-step-ms", "1000000")
SERVERS = {
    "default": (),
    "no bound": UNBOUNDED,
    "chunks of 512": (*UNBOUNDED, "--long-prefill-token-threshold", "512"),
}
"""The options of each."""

NUM_STREAMS, STREAM_TOKENS = 4, 64
NUM_PROMPTS = 2
ALONE_SECONDS = 4.0
"""The streams begin so long before the prompts."""
WARM_UP_TOKENS = 100
SETTLED_SECONDS = 1.0
"""So long after their first tokens streams go evenly."""

MOST_SLOWDOWN, LEAST_SHARE = 5.0, 0.7
"""The bars."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one server did once.

    Attributes:
        alone: Median seconds between two tokens of a stream before the prompts came.
        beside: 50th, 95th and 99th percentile of the same until they were computed, and the longest.
        prompt_speed: Tokens of prompts a second.
        others: Cores that other programs used.
    """

    alone: float
    beside: list[float]
    prompt_speed: float
    others: float

    @property
    def slowdown(self) -> float:
        return self.beside[1] / self.alone


def sum_up(streams: Sequence[RequestRecord], prompts: Sequence[RequestRecord], others: float) -> Round:
    """What a round's answers say.

    Raises:
        ServerError: One failed, or the streams ended too early.
    """
    failed = [record.error for record in (*streams, *prompts) if record.error is not None]
    if failed:
        raise ServerError(f"{len(failed)} requests failed: {failed[0]}")
    begin, end = min(record.start for record in prompts), max(record.text_times[0] for record in prompts)
    settled = max(record.text_times[0] for record in streams) + SETTLED_SECONDS
    if min(record.end for record in streams) < end:
        raise ServerError("streams ended before the prompts were computed: give --stream-tokens more")
    gaps = [gap for record in streams for gap in pairwise(record.text_times)]
    alone = [later - earlier for earlier, later in gaps if settled <= earlier and later <= begin]
    beside = [later - earlier for earlier, later in gaps if later > begin and earlier < end]
    if not alone:
        raise ServerError("no stream had settled when the prompts came: this machine is too slow")
    percentiles = [float(value) for value in np.percentile(beside, [50, 95, 99, 100])]
    num_tokens = sum(record.input_tokens for record in prompts)
    return Round(median(alone), percentiles, num_tokens / (end - begin), others)


async def measure(server: Server, prompts: PromptMaker, prompt_tokens: int, stream_tokens: int) -> Round:
    """Sends the streams, and then the prompts."""
    assert server.pid is not None
    planned = [PlannedRequest(prompts.make(STREAM_TOKENS), stream_tokens, 0.0) for _ in range(NUM_STREAMS)]
    planned += [PlannedRequest(prompts.make(prompt_tokens), 1, ALONE_SECONDS) for _ in range(NUM_PROMPTS)]
    tree = [*process_tree(server.pid), os.getpid()]
    began, of_others = time.perf_counter(), machine_seconds() - processor_seconds(tree)
    records = await server.client.run(planned, None, lambda: None)
    of_others = machine_seconds() - processor_seconds(tree) - of_others
    others = max(0.0, of_others) / (time.perf_counter() - began)
    return sum_up(records[:NUM_STREAMS], records[NUM_STREAMS:], others)


def middle(rounds: Sequence[Round]) -> tuple[float, float, float, float, float]:
    """Medians: milliseconds alone, the 95th percentile beside, how many times that is, tokens/s, cores of others."""
    return (
        1e3 * median(one.alone for one in rounds),
        1e3 * median(one.beside[1] for one in rounds),
        median(one.slowdown for one in rounds),
        median(one.prompt_speed for one in rounds),
        median(one.others for one in rounds),
    )


def format_rounds(rounds: dict[str, list[Round]]) -> str:
    """A line for each server."""
    speed = middle(rounds["chunks of 512"])[3]
    lines = []
    for name, ones in rounds.items():
        alone, beside, slowdown, prompt_speed, others = middle(ones)
        numbers = f"{alone:.1f}", f"{beside:.1f}", f"{slowdown:.2f}", f"{prompt_speed:.0f}"
        lines.append([name, *numbers, f"{prompt_speed / speed:.2f}", f"{others:.2f}"])
    header = [
        "server",
        "alone ms",
        "p95 beside ms",
        "times",
        "prompts tok/s",
        "share of 512's",
        "others, cores",
    ]
    return format_table(header, lines)


def problems(rounds: dict[str, list[Round]]) -> list[str]:
    """What misses a bar, in a line each."""
    slowdown = median(one.slowdown for one in rounds["default"])
    share = median(
        one.prompt_speed / other.prompt_speed
        for one, other in zip(rounds["default"], rounds["chunks of 512"], strict=True)
    )
    found = []
    if slowdown > MOST_SLOWDOWN:
        found.append(f"a token beside the prompts takes {slowdown:.2f} times as long")
    if share < LEAST_SHARE:
        found.append(f"prompts have {share:.2f} times the tokens/s of those in chunks of 512")
    return found


async def _main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    described = describe_run(arguments)
    prompts = PromptMaker(options.seed, time.time_ns())
    common = ("--model", options.model, "--quant", options.quant, *options.option)
    rounds: dict[str, list[Round]] = {name: [] for name in SERVERS}
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(running_engine(name, (*common, *own)))
            for name, own in SERVERS.items()
        ]
        for server in servers:
            # A server knows what steps cost, and its threads are there, once it has run some.
            warm_up = [
                PlannedRequest(prompts.make(WARM_UP_TOKENS), WARM_UP_TOKENS) for _ in range(2 * NUM_STREAMS)
            ]
            await server.client.run(warm_up, NUM_STREAMS, lambda: None)
        turns = [server for _ in range(options.repeat) for server in servers]
        for server in tqdm(turns, unit="turn"):
            one = await measure(server, prompts, options.prompt_tokens, options.stream_tokens)
            rounds[server.name].append(one)
    print(format_rounds(rounds))
    found = problems(rounds)
    print(*found, sep="\n")
    if options.output is not None:
        figures = {name: [asdict(one) for one in ones] for name, ones in rounds.items()}
        result = {"benchmark": "long_prompts", **described, "servers": SERVERS, "rounds": figures}
        write_json(options.output, {**result, "problems": found})
    return 1 if found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_prompts", description="Long prompts that come beside streams."
    )
    add = parser.add_argument
    add("--model", default="llama", help="default: %(default)s")
    add("--quant", default="int8", help="default: %(default)s")
    add("--prompt-tokens", type=int, default=7000, help="of each prompt (default: %(default)s)")
    add("--stream-tokens", type=int, default=2000, help="of each stream's answer (default: %(default)s)")
    add("--repeat", type=int, default=3, help="rounds (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    add("--output", type=Path, help="JSON file for the figures")
    add("--option", nargs=argparse.REMAINDER, default=[], help="further options of engine.serve, at the end")
    try:
        return asyncio.run(_main(parser.parse_args(words), words))
    except ServerError as error:
        print(f"ServerError: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
