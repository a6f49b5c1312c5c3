"""The engine beside other servers on this machine's CPU: `python -m benchmarks.cpu --help`."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.client import CompletionsClient, ServerError
from benchmarks.machine import describe_run
from benchmarks.metrics import RequestRecord, summarize
from benchmarks.profiling import format_operators, profile_phases
from benchmarks.prompts import WORDS
from benchmarks.report import format_table, record_to_json, write_json
from benchmarks.scenarios import PlannedRequest
from benchmarks.servers import (
    BiasedClient,
    Server,
    machine_seconds,
    process_tree,
    processor_seconds,
    proportional_memory,
    running_engine,
    server_version,
)
from benchmarks.serving import positive_int
from engine import LLM
from engine.errors import EngineError
from engine.loading.resolve import resolve_model
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer

DEFINITIONS = """\
A decode: (output tokens - 1) / time from the first text to the end; B, C: all output tokens / time from the first
request to the last end; D: prompt tokens / time to the first text; E: time from the first request to the last end,
the shared tokens not seen before. Ready: process started -> /health answers 200, with a filled cache. Memory: highest
sum over the server's processes of their proportional set sizes, and idle: the processor time of these processes,
both with no other server of ours running, over and after a round of all scenarios that is counted nowhere else. API
process: what ours, which renders, tokenizes, detokenizes and speaks HTTP, uses during C.
Cells: median (lowest..highest), and how many times as good as the best peer's median (above 1x: better)."""

_IDLE_SECONDS = 5.0
_PAUSE_SECONDS = 3.0  # before every run, for threads of the last server that still spin
_SAMPLING_SECONDS = 0.5
_PRECISION = {"tok/s": 1, "s": 2, "MiB": 0, "% of a core": 1}


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests that are all sent at once; `metric` names the reported field of benchmarks.metrics.Summary."""

    title: str
    metric: str
    unit: str
    streams: int
    own_tokens: int
    output_tokens: int
    shared_tokens: int = 0


SCENARIOS = {
    "A": Scenario("1 stream, 128 in, 128 out: decode", "decode_tokens_per_second", "tok/s", 1, 128, 128),
    "B": Scenario("8 streams, 128 in, 128 out", "output_tokens_per_second", "tok/s", 8, 128, 128),
    "C": Scenario("32 streams, 256 in, 128 out", "output_tokens_per_second", "tok/s", 32, 256, 128),
    "D": Scenario("1024 in: prefill", "prefill_tokens_per_second", "tok/s", 1, 1024, 1),
    "E": Scenario("32 at once, 512 shared + 32 in, 32 out", "duration", "s", 32, 32, 32, shared_tokens=512),
}
# Rows of the table: title and unit. More is better where the unit is a rate, less everywhere else.
ROWS = {name: (f"{name}  {scenario.title}", scenario.unit) for name, scenario in SCENARIOS.items()} | {
    "start": ("start to ready", "s"),
    "memory": ("peak memory", "MiB"),
    "idle": ("idle", "% of a core"),
    "api": ("API process during C", "% of a core"),
}


class ExactPrompts:
    """Random texts of an exact number of tokens, no two of which begin alike.

    Each word is one token of `tokenizer` wherever it stands. Servers with the same vocabulary get the same text.
    """

    def __init__(self, tokenizer: Tokenizer, seed: str) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._num_added = len(tokenizer.encode(""))  # BOS, where the model has one
        self._words = [word for word in WORDS if self._size(word) == 1 and self._size(f"{word} {word}") == 2]

    def _size(self, text: str) -> int:
        return len(self._tokenizer.encode(text)) - self._num_added

    def make(self, num_tokens: int, prefix: str = "") -> str:
        """A text of `num_tokens` tokens, BOS included, that begins with `prefix`, itself made here."""
        start = [prefix] if prefix else []
        num_words = num_tokens - self._num_added - self._size(prefix)
        text = " ".join(start + self._random.choices(self._words, k=num_words))
        if (size := self._size(text) + self._num_added) != num_tokens:
            raise EngineError(f"words of one token each made {size} tokens, not {num_tokens}")
        return text

    def requests(self, scenario: Scenario) -> list[PlannedRequest]:
        """Fresh requests of one run."""
        shared = self.make(scenario.shared_tokens) if scenario.shared_tokens else ""
        size = scenario.shared_tokens + scenario.own_tokens
        texts = [self.make(size, shared) for _ in range(scenario.streams)]
        return [PlannedRequest(text, scenario.output_tokens) for text in texts]


@dataclass(slots=True)
class Results:
    """All numbers: values[server][row], and every run with its requests for the record."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, server: str, row: str, value: float) -> None:
        self.values.setdefault(server, {}).setdefault(row, []).append(value)


async def run_once(
    server: Server, name: str, requests: list[PlannedRequest], results: Results, is_counted: bool
) -> None:
    """Run one scenario on one server; a run of which a request failed or ended early has no value."""
    start, before, api_before = time.perf_counter(), _foreign_seconds(server), _api_seconds(server)
    records = await server.client.run(requests, len(requests), lambda: None)
    duration = time.perf_counter() - start
    foreign = (_foreign_seconds(server) - before) / duration
    api = (_api_seconds(server) - api_before) / duration
    value = getattr(summarize(records), SCENARIOS[name].metric)
    problem = next((record.error for record in records if record.error is not None), None)
    if problem is None and any(record.output_tokens != requests[0].max_tokens for record in records):
        problem = f"outputs were not {requests[0].max_tokens} tokens long; see --without-ignore-eos"
    if problem is not None:
        results.errors.append(f"{server.name}, scenario {name}: {problem}")
    elif is_counted:
        results.add(server.name, name, value)
        if name == "C" and server.is_ours:
            results.add(server.name, "api", 100 * api)
    beside = "" if server.pid is None else f", other programs used {foreign:.2f} cores"
    tqdm.write(f"{server.name}  {name}{'' if is_counted else ' (not counted)'}  {value or 0:.2f}{beside}")
    results.runs.append(
        {
            "server": server.name,
            "scenario": name,
            "counted": is_counted,
            "value": value,
            "foreign_cores": None if server.pid is None else foreign,
            "api_cores": api if server.is_ours else None,
            "requests": [_record(record) for record in records],
        }
    )


def _foreign_seconds(server: Server) -> float:
    """Processor time of all that is neither the server nor this client; without meaning if no pid was told."""
    tree = [] if server.pid is None else process_tree(server.pid)
    return machine_seconds() - processor_seconds([*tree, os.getpid()])


def _api_seconds(server: Server) -> float:
    """Processor time of a server's first process, which is the API of ours."""
    return 0.0 if server.pid is None else processor_seconds([server.pid])


def disturbance(runs: Iterable[dict[str, Any]]) -> str:
    """What other programs took from counted runs: numbers taken beside a busy program say little."""
    shares = [run["foreign_cores"] for run in runs if run["counted"] and run["foreign_cores"] is not None]
    if not shares:
        return "How much other programs ran meanwhile is not known."
    return (
        f"Other programs, idle servers included, used {median(shares):.2f} cores (up to {max(shares):.2f})."
    )


def _record(record: RequestRecord) -> dict[str, Any]:
    """A request's numbers for the record: of its chunks' times the first is enough."""
    return record_to_json(record) | {"text_times": [round(time, 6) for time in record.text_times[:1]]}


async def inspect_alone(
    server: Server, names: Sequence[str], prompts: ExactPrompts, results: Results, progress: tqdm[Any]
) -> None:
    """A first round that warms the server up, while its memory is watched; then its idle time."""

    async def one_round() -> None:
        for name in names:
            progress.set_postfix_str(f"{server.name} {name}, not counted")
            await run_once(server, name, prompts.requests(SCENARIOS[name]), results, is_counted=False)
            progress.update()

    work, peak = asyncio.ensure_future(one_round()), 0.0
    while not work.done():
        await asyncio.wait([work], timeout=_SAMPLING_SECONDS)
        if server.pid is not None:
            peak = max(
                peak, await asyncio.to_thread(lambda pid: proportional_memory(process_tree(pid)), server.pid)
            )
    await work
    if server.pid is None:
        return
    results.add(server.name, "memory", peak)
    await asyncio.sleep(_PAUSE_SECONDS)
    tree, start = process_tree(server.pid), time.perf_counter()
    used = processor_seconds(tree)
    await asyncio.sleep(_IDLE_SECONDS)
    used = processor_seconds(tree) - used
    results.add(server.name, "idle", 100 * used / (time.perf_counter() - start))


def format_comparison(values: dict[str, dict[str, list[float]]], peers: Iterable[str]) -> str:
    """The table: a row a number, a column a server; those that are not peers with their ratios to the best."""
    lines = []
    for row, (title, unit) in ROWS.items():
        medians = {name: median(rows[row]) for name, rows in values.items() if row in rows}
        if not medians:
            continue
        more_is_better = unit.endswith("/s")
        rivals = [medians[name] for name in peers if name in medians]
        cells = [title, unit]
        for name in values:
            cell = _spread(values[name][row], _PRECISION[unit]) if name in medians else "-"
            if rivals and name in medians and name not in peers and medians[name] > 0:
                best = max(rivals) if more_is_better else min(rivals)
                cell += f" {medians[name] / best if more_is_better else best / medians[name]:.2f}x"
            cells.append(cell)
        lines.append(cells)
    return format_table(["", "", *values], lines)


def _spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low}..{high})" if len(values) > 1 else middle


def parse_peer(text: str) -> tuple[str, str, str | None]:
    """An argparse type: NAME=URL or NAME=URL=MODEL."""
    name, _, rest = text.partition("=")
    base_url, _, model = rest.partition("=")
    if not name or not base_url.startswith("http"):
        raise argparse.ArgumentTypeError(f"must be NAME=http://HOST:PORT[=MODEL], got {text}")
    return name, base_url.rstrip("/").removesuffix("/v1"), model or None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description="Measure servers of the engine, which this starts, beside peers, which run already.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="llama", help="as for engine.serve; its tokenizer counts the prompts' tokens")
    add("--quant", nargs="*", default=["int8", "int4"], help="of our servers; none after it: peers only")
    add("--kv-cache-dtype", nargs="+", default=["int8"], help="of our servers, each with every --quant")
    add("--kv-cache-memory", default="1GiB", help="of our servers; enough for every scenario")
    add(
        "--option",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="another option of engine.serve, e.g. --option num-threads 1; may be repeated",
    )
    add("--peer", type=parse_peer, action="append", default=[], help="NAME=URL[=MODEL]; may be repeated")
    add("--peer-pid", action="append", default=[], metavar="NAME=PID", help="its first process, for memory")
    add(
        "--without-ignore-eos",
        action="append",
        default=[],
        metavar="NAME",
        help="a peer that has no such field",
    )
    add("--scenario", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), help="what to run")
    add("--repeat", type=positive_int, default=3, help="counted rounds")
    add("--profile", action="store_true", help="first print the share of a step by operation")
    add("--seed", type=int, default=0, help="of the prompts' words, beside the time")
    add(
        "--output", type=Path, help="JSON with every number (default: benchmarks/results/cpu-{cores}cpu.json)"
    )
    options = parser.parse_args(arguments)
    names = [name for name, _, _ in options.peer]
    try:
        options.peer_pid = {
            name: int(pid) for name, _, pid in (text.partition("=") for text in options.peer_pid)
        }
    except ValueError:
        parser.error("--peer-pid must be NAME=PID")
    if unknown := {*options.peer_pid, *options.without_ignore_eos} - {*names}:
        parser.error(f"no --peer is called {', '.join(sorted(unknown))}")
    if not options.quant and not names:
        parser.error("nothing to measure: give --quant or --peer")
    return options


def engine_options(options: argparse.Namespace) -> dict[str, list[str]]:
    """The command line of every server of ours, by its name in the table."""
    fixed = ["--model", options.model, "--kv-cache-memory", options.kv_cache_memory]
    fixed += [word for name, value in options.option for word in (f"--{name.replace('_', '-')}", value)]
    return {
        f"{quant} {dtype}": ["--quant", quant, "--kv-cache-dtype", dtype, *fixed]
        for quant in options.quant
        for dtype in options.kv_cache_dtype
    }


async def run_benchmark(options: argparse.Namespace, results: Results) -> dict[str, Any]:
    """Run everything; returns what there is to say of the servers."""
    tokenizer = load_tokenizer(resolve_model(options.model))
    prompts = ExactPrompts(tokenizer, f"{options.seed} {time.time_ns()}")
    engines = engine_options(options)
    names = options.scenario
    num_servers, num_starts = len(engines) + len(options.peer), len(engines) * (options.repeat + 2)
    total = num_servers * len(names) * (options.repeat + 1) + num_starts
    async with AsyncExitStack() as stack:
        progress = stack.enter_context(tqdm(total=total, unit="run"))
        peers = []
        for name, base_url, model in options.peer:
            has_field = name not in options.without_ignore_eos
            client = (
                CompletionsClient(base_url, model, None, ignore_eos=True)
                if has_field
                else BiasedClient(base_url, model, tokenizer.eos_token_ids)
            )
            await stack.enter_async_context(client)
            await client.find_model()
            peers.append(Server(name, base_url, client, options.peer_pid.get(name)))

        for repetition in range(options.repeat + 1):  # the first start fills the cache
            for name, command in engines.items():
                progress.set_postfix_str(f"start of {name}")
                async with running_engine(name, command) as server:
                    if repetition and server.start_seconds is not None:
                        results.add(name, "start", server.start_seconds)
                    progress.update()
                    if repetition == options.repeat:
                        await inspect_alone(server, names, prompts, results, progress)
        for server in peers:
            await inspect_alone(server, names, prompts, results, progress)

        servers = []
        for name, command in engines.items():
            progress.set_postfix_str(f"start of {name}")
            servers.append(await stack.enter_async_context(running_engine(name, command)))
            progress.update()
            # What a server does once, it does before the rounds that count.
            await run_once(servers[-1], "A", prompts.requests(SCENARIOS["A"]), results, is_counted=False)
        servers += peers
        for repetition in range(options.repeat):
            first = repetition % len(servers)
            for name in names:
                requests = prompts.requests(SCENARIOS[name])
                for server in servers[first:] + servers[:first]:
                    progress.set_postfix_str(f"{server.name} {name}")
                    await asyncio.sleep(_PAUSE_SECONDS)
                    await run_once(server, name, requests, results, is_counted=True)
                    progress.update()
        return {
            "engines": engines,
            "peers": {
                server.name: {"base_url": server.base_url, "version": server_version(server.base_url)}
                for server in peers
            },
        }


def print_profiles(options: argparse.Namespace) -> None:
    """Where prefills of 512 tokens and decode steps spend their time, for each of our configurations."""
    source = random.Random(options.seed)
    for quant in options.quant:
        for dtype in options.kv_cache_dtype:
            llm = LLM(
                model=options.model,
                quant=quant,
                kv_cache_dtype=dtype,
                kv_cache_memory=options.kv_cache_memory,
            )
            for streams, size in ((1, 512), (8, 64), (32, 16)):
                make_prompts = partial(_random_prompts, source, streams, size, llm.core.info.vocab_size)
                for phase in profile_phases(llm, make_prompts, 16):
                    print(f"\n{quant} {dtype}, {streams} x {size} tokens\n{format_operators(phase)}")


def _random_prompts(source: random.Random, streams: int, size: int, vocab_size: int) -> list[list[int]]:
    return [source.choices(range(vocab_size), k=size) for _ in range(streams)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every request succeeded, 1 if one failed, 2 if a server could not be used."""
    options = parse_arguments(arguments)
    result = {"benchmark": "cpu"} | describe_run(sys.argv[1:] if arguments is None else arguments)
    results = Results()
    if options.profile:
        print_profiles(options)
    try:
        result |= asyncio.run(run_benchmark(options, results))
    except (ServerError, EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        results.errors.append("interrupted; what was measured until then follows")
    print(f"{DEFINITIONS}\n\n{format_comparison(results.values, [name for name, _, _ in options.peer])}")
    print(f"\n{disturbance(results.runs)}")
    for problem in results.errors:
        print(f"failed: {problem}")
    cores = result["machine"]["usable_cores"]
    output = options.output or Path(__file__).parent / "results" / f"cpu-{cores}cpu.json"
    write_json(output, result | {"values": results.values, "errors": results.errors, "runs": results.runs})
    return 1 if results.errors else 0


if __name__ == "__main__":
    sys.exit(main())
