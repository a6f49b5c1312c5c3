"""A server under more load than it can serve, and under a little less for a long time.

    python -m benchmarks.load                        # full load, twice that, and 80 % of it for a quarter of an hour
    python -m benchmarks.load --soak-minutes 0       # without the last

First it measures what can be served: requests that end in a second while 16 clients ask, each again when it has its
answer, and none is refused. Then requests arrive at random, as many a second as that, and twice as many, whatever
waits: those that the server takes in should have their first token within 5 s, and 95 % of their tokens within 0.2 s.

`make chaos` runs it. Exit status 1: a bar was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.client import ServerError
from benchmarks.machine import describe_run
from benchmarks.metrics import RequestRecord
from benchmarks.prompts import PromptMaker
from benchmarks.report import format_table, write_json
from benchmarks.scenarios import PlannedRequest
from benchmarks.servers import (
    Server,
    machine_seconds,
    process_tree,
    processor_seconds,
    proportional_memory,
    running_engine,
)

TTFT_SECONDS, ITL_SECONDS = 5.0, 0.2
"""The objective: the time to the first token, and that between two which 95 % of a request's have."""

OPTIONS = ("--quant", "int8", "--max-step-ms", "150", "--max-num-seqs", "40", "--kv-cache-memory", "512MiB")
"""A quarter of the second objective is left for what is not the engine's step, and as many sequences run as decode
within the step on two slow cores. The cache is soon full, so that memory shows what else grows."""

OBJECTIVE = ("--slo-ttft-ms", f"{1000 * TTFT_SECONDS:g}")

LEAST_GOOD, LEAST_GOODPUT = 0.95, 0.9
"""The bars at twice the load: the share of requests taken in that meet the objective, and the tokens of those that do
in a second, as a share of the same at full load."""

NUM_CLIENTS = 16
SOAK_SHARE = 0.8
SAMPLE_SECONDS = 10.0
TOO_MANY_REQUESTS = 429


def plan_requests(
    number: int, rate: float | None, rng: random.Random, prompts: PromptMaker
) -> list[PlannedRequest]:
    """Requests with prompts and answers of many lengths: 245 and 120 tokens in the mean.

    Args:
        rate: Arrivals a second, of a Poisson process; None: none has a time.
    """
    planned, now = [], 0.0
    for _ in range(number):
        arrival = None
        if rate is not None:
            now += rng.expovariate(rate)
            arrival = now
        num_prompt = min(3000, 1 + int(rng.lognormvariate(5.0, 1.0)))
        num_output = min(1000, 20 + int(rng.expovariate(1 / 100)))
        planned.append(PlannedRequest(prompts.make(num_prompt), num_output, arrival))
    return planned


def is_good(record: RequestRecord) -> bool:
    """Whether an answer met the objective."""
    gaps = sorted(record.itl)
    late = gaps[int(0.95 * len(gaps))] if gaps else 0.0
    return record.error is None and record.ttft <= TTFT_SECONDS and late <= ITL_SECONDS


@dataclass(frozen=True, slots=True)
class Phase:
    """What came of requests that arrived at one rate.

    Attributes:
        rate: Arrivals a second that were meant.
        seconds: From the first arrival to the last end.
        num_refused: Answered with 429.
        failures: Why others failed.
        share_good: Share of those taken in that met the objective.
        goodput: Tokens a second of these.
        ttft, itl: 50th, 95th and 99th percentile in seconds; of the gaps of all requests.
        sent_late: Seconds by which the client itself was late, at most.
    """

    rate: float
    seconds: float
    num_requests: int
    num_refused: int
    failures: list[str]
    share_good: float
    goodput: float
    ttft: list[float]
    itl: list[float]
    sent_late: float


def sum_up(records: Sequence[RequestRecord], rate: float) -> Phase:
    """What came of these requests, one or more, in the order of their arrivals."""
    taken = [record for record in records if record.status != TOO_MANY_REQUESTS]
    good = [record for record in taken if is_good(record)]
    done = [record for record in taken if record.error is None]
    seconds = max(record.end for record in records) - (records[0].scheduled or 0.0)
    return Phase(
        rate=round(rate, 3),
        seconds=round(seconds, 1),
        num_requests=len(records),
        num_refused=len(records) - len(taken),
        failures=[str(record.error) for record in taken if record.error is not None],
        share_good=round(len(good) / max(1, len(taken)), 4),
        goodput=round(sum(record.output_tokens for record in good) / seconds, 1),
        ttft=_percentiles([record.ttft for record in done]),
        itl=_percentiles([gap for record in done for gap in record.itl]),
        sent_late=round(max(record.start - (record.scheduled or 0.0) for record in records), 3),
    )


def _percentiles(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in np.percentile(values or [0.0], [50, 95, 99])]


async def send(server: Server, title: str, requests: Sequence[PlannedRequest]) -> list[RequestRecord]:
    """Sends requests at their times, however many are open, and waits until all have ended. Says what else ran."""
    assert server.pid is not None
    tree = process_tree(server.pid)
    began = machine_seconds() - processor_seconds([*tree, os.getpid()])
    with tqdm(total=len(requests), unit="request", desc=title) as bar:
        records = await server.client.run(requests, None, bar.update)
    others = machine_seconds() - processor_seconds([*tree, os.getpid()]) - began
    print(f"{title}: other programs used {max(0.0, others) / max(r.end for r in records):.2f} cores")
    return records


async def sustainable_rate(server: Server, requests: Sequence[PlannedRequest]) -> float:
    """Requests that end in a second while all clients are at work: after the first of each, before the last one."""
    with tqdm(total=len(requests), unit="request", desc="what can be served") as bar:
        records = await server.client.run(requests, NUM_CLIENTS, bar.update)
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise ServerError(f"{len(failed)} requests failed: {failed[0]}")
    ends = sorted(record.end for record in records)
    since, until = ends[NUM_CLIENTS - 1], max(record.start for record in records)
    return sum(since < end <= until for end in ends) / (until - since)


@dataclass(frozen=True, slots=True)
class Held:
    """What a server holds.

    Attributes:
        memory: MiB of all its processes; what several hold is shared out among them.
        num_descriptors, num_processes, num_threads: Of all its processes.
        num_shared_files: In /dev/shm, whoever made them.
    """

    memory: float
    num_descriptors: int
    num_processes: int
    num_threads: int
    num_shared_files: int


def held_by(pid: int) -> Held:
    """What the server of this process holds now."""
    tree = process_tree(pid)

    def count(kind: str) -> int:
        return sum(len(os.listdir(f"/proc/{one}/{kind}")) for one in tree)

    return Held(
        round(proportional_memory(tree), 1),
        count("fd"),
        len(tree),
        count("task"),
        len(os.listdir("/dev/shm")),
    )


async def _sample(pid: int, samples: list[Held]) -> None:
    while True:
        samples.append(await asyncio.to_thread(held_by, pid))
        await asyncio.sleep(SAMPLE_SECONDS)


async def soak(server: Server, requests: Sequence[PlannedRequest], rate: float) -> dict[str, Any]:
    """What the server holds before, meanwhile and after, and how it answers in the first and the last fifth."""
    assert server.pid is not None
    samples: list[Held] = []
    before = held_by(server.pid)
    sampling = asyncio.create_task(_sample(server.pid, samples))
    try:
        records = await send(server, "soak", requests)
    finally:
        sampling.cancel()
    # Closed connections have gone by then.
    await asyncio.sleep(SAMPLE_SECONDS)
    fifth = max(1, len(records) // 5)
    return {
        "first": asdict(sum_up(records[:fifth], rate)),
        "last": asdict(sum_up(records[-fifth:], rate)),
        "whole": asdict(sum_up(records, rate)),
        "before": asdict(before),
        "meanwhile": [asdict(sample) for sample in samples],
        "after": asdict(held_by(server.pid)),
    }


def format_phases(phases: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A line for each rate; times are p50, p95 and p99 in milliseconds."""

    def line(title: str, phase: dict[str, Any]) -> list[str]:
        times = [" / ".join(f"{1000 * value:.0f}" for value in phase[name]) for name in ("ttft", "itl")]
        return [
            title,
            f"{phase['rate']:.2f}",
            str(phase["num_requests"]),
            str(phase["num_refused"]),
            str(len(phase["failures"])),
            f"{100 * phase['share_good']:.1f}",
            f"{phase['goodput']:.0f}",
            *times,
        ]

    header = ["load", "req/s", "requests", "refused", "failed", "% good", "good tok/s", "TTFT ms", "ITL ms"]
    return format_table(header, [line(title, phase) for title, phase in phases])


def problems(full: dict[str, Any], twice: dict[str, Any], soaked: dict[str, Any] | None) -> list[str]:
    """What misses a bar, in a line each."""
    found = [f"failed: {why}" for phase in (full, twice) for why in phase["failures"]]
    if twice["share_good"] < LEAST_GOOD:
        found.append(
            f"{100 * twice['share_good']:.1f} % of those taken in meet the objective at twice the load"
        )
    if twice["goodput"] < LEAST_GOODPUT * full["goodput"]:
        found.append(f"goodput falls to {twice['goodput'] / full['goodput']:.2f} at twice the load")
    if soaked is not None:
        found += [f"failed while it soaked: {why}" for why in soaked["whole"]["failures"]]
        # Threads are printed alone: a pool of few, which does not end, starts one more when all are busy.
        for name in ("num_descriptors", "num_processes", "num_shared_files"):
            if soaked["after"][name] > soaked["before"][name]:
                found.append(f"{name} rose from {soaked['before'][name]} to {soaked['after'][name]}")
    return found


async def _main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    described = describe_run(arguments)
    rng, prompts = random.Random(options.seed), PromptMaker(options.seed, time.time_ns())
    command = ["--model", options.model, *OPTIONS, *options.option]
    async with running_engine("engine", command) as server:
        num_served = max(4 * NUM_CLIENTS, options.requests // 3)
        rate = await sustainable_rate(server, plan_requests(num_served, None, rng, prompts))
    print(f"{rate:.2f} requests a second can be served")
    command += OBJECTIVE
    result: dict[str, Any] = {"benchmark": "load", **described, "options": command, "sustainable_rate": rate}
    async with running_engine("engine", command) as server:
        for name, share in (("full", 1.0), ("twice", 2.0)):
            # Both take as long.
            requests = plan_requests(round(share * options.requests), share * rate, rng, prompts)
            result[name] = asdict(sum_up(await send(server, name, requests), share * rate))
        soaked = None
        if options.soak_minutes:
            number = max(10, round(60 * options.soak_minutes * SOAK_SHARE * rate))
            requests = plan_requests(number, SOAK_SHARE * rate, rng, prompts)
            soaked = result["soak"] = await soak(server, requests, SOAK_SHARE * rate)
    phases = [("full", result["full"]), ("twice", result["twice"])]
    if soaked is not None:
        phases += [(f"soak, {part}", soaked[part]) for part in ("first", "last", "whole")]
    print(format_phases(phases))
    if soaked is not None:
        rows = [
            [title, *map(str, held.values())]
            for title, held in (
                ("before", soaked["before"]),
                ("at the start", soaked["meanwhile"][0]),
                ("at the end", soaked["meanwhile"][-1]),
                ("after", soaked["after"]),
            )
        ]
        print(format_table(["soak", "MiB", "descriptors", "processes", "threads", "shared files"], rows))
    result["problems"] = problems(result["full"], result["twice"], soaked)
    print(*result["problems"], sep="\n")
    if options.output is not None:
        write_json(options.output, result)
    return 1 if result["problems"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description="A server under more load than it can serve, and under a little less for a long time.",
    )
    add = parser.add_argument
    add("--model", default="llama", help="default: %(default)s")
    add(
        "--requests",
        type=int,
        default=300,
        help="at full load; twice as many at twice (default: %(default)s)",
    )
    add("--soak-minutes", type=float, default=15.0, help="at 80 %% of full load (default: %(default)s)")
    add("--seed", type=int, default=0, help="of lengths and arrivals (default: %(default)s)")
    add("--output", type=Path, help="JSON file for the figures")
    add("--option", nargs=argparse.REMAINDER, default=[], help="further options of engine.serve, at the end")
    try:
        return asyncio.run(_main(parser.parse_args(words), words))
    except ServerError as error:
        print(f"ServerError: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
