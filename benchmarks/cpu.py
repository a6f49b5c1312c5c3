"""The engine beside other servers on this machine's CPU: `python -m benchmarks.cpu --help`."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.client import ServerError
from benchmarks.cpu_scenarios import DEFAULT_SCENARIOS, SCENARIOS, ExactPrompts, Scenario
from benchmarks.machine import describe_run
from benchmarks.metrics import RequestRecord, summarize
from benchmarks.profiling import format_operators, profile_phases
from benchmarks.report import format_table, record_to_json, write_json
from benchmarks.roofline import (
    Footprint,
    Peaks,
    footprint_of_engine,
    footprint_of_peer,
    measure_peaks,
    shares,
)
from benchmarks.scenarios import PlannedRequest
from benchmarks.servers import (
    PeerClient,
    Server,
    machine_seconds,
    process_tree,
    processor_seconds,
    proportional_memory,
    running_engine,
    running_hogs,
    server_version,
)
from benchmarks.serving import positive_int
from engine import LLM
from engine.arguments import add_engine_options
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.loading.resolve import resolve_model
from engine.tokenizer.tokenizer import load_tokenizer

DEFINITIONS = """\
decode (1 stream): (output tokens - 1) / time from the first text to the end; output (more streams): all output tokens
/ time from the first request to the last end, prefills included, but where it says decode: there as in every decode
the prefix cache has the prompts; prefill: prompt tokens / time to the first text; E: time from the first request to
the last end, the shared tokens not seen before. Sampled: temperature 0.8, top_p 0.95, and no other filter.
start: process started -> /health answers 200, with a filled cache. Memory: highest sum over the server's processes of
their proportional set sizes, and idle: the processor time of these processes, both with no other server of ours
running, over and after a round of all scenarios that is counted nowhere else. API process: what ours, which renders,
tokenizes, detokenizes and speaks HTTP, uses during C.
Cells: median (lowest..highest), how many times as good as the best peer's median (above 1x: better), and in brackets
the shares in % of the bytes a second that memory gives | of the int8 multiply-adds a second that all threads make,
measured before: what the model asks for, weights once a step, not what a kernel adds to it."""

_IDLE_SECONDS = 5.0
_PAUSE_SECONDS = 3.0  # before every run, for threads of the last server that still spin
_SAMPLING_SECONDS = 0.5
_PRECISION = {"tok/s": 1, "s": 2, "MiB": 0, "% of a core": 1}

OTHER_ROWS = {
    "start": ("start to ready", "s"),
    "memory": ("peak memory", "MiB"),
    "idle": ("idle", "% of a core"),
    "api": ("API process during C", "% of a core"),
}
"""Of the table, below the scenarios': title and unit. More is better of a rate, less of everything else."""

MEASURED_ALONE = ("start", "memory")
"""What is measured of a server while no other one of ours runs, and is chosen like a scenario."""


@dataclass(slots=True)
class Results:
    """All numbers: values[server][row], and every run with its requests for the record."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, server: str, row: str, value: float) -> None:
        self.values.setdefault(server, {}).setdefault(row, []).append(value)


async def run_once(
    server: Server,
    name: str,
    scenario: Scenario,
    requests: list[PlannedRequest],
    results: Results,
    is_counted: bool,
) -> None:
    """Run one scenario on one server; a run of which a request failed or ended early has no value."""
    warming = []
    if scenario.is_warm:
        first_tokens = [replace(request, max_tokens=1) for request in requests]
        warming = await server.client.run(first_tokens, len(requests), lambda: None)
    with running_hogs(scenario.hogs, scenario.niceness) as hogs:
        start = time.perf_counter()
        before, api_before = _foreign_seconds(server, hogs), _api_seconds(server)
        records = await server.client.run(requests, len(requests), lambda: None)
        duration = time.perf_counter() - start
        foreign = (_foreign_seconds(server, hogs) - before) / duration
        api = (_api_seconds(server) - api_before) / duration
    value = getattr(summarize(records), scenario.metric)
    problem = next((record.error for record in (*warming, *records) if record.error is not None), None)
    if problem is None and any(record.output_tokens != scenario.output_tokens for record in records):
        problem = f"outputs were not {scenario.output_tokens} tokens long; see --without-ignore-eos"
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


def _foreign_seconds(server: Server, hogs: Iterable[int]) -> float:
    """Processor time of all but the server, this client and its hogs; without meaning if no pid was told."""
    tree = [] if server.pid is None else process_tree(server.pid)
    return machine_seconds() - processor_seconds([*tree, *hogs, os.getpid()])


def _api_seconds(server: Server) -> float:
    """Processor time of a server's first process, which is the API of ours."""
    return 0.0 if server.pid is None else processor_seconds([server.pid])


def disturbance(runs: Iterable[dict[str, Any]]) -> str:
    """What other programs took from counted runs: numbers taken beside a busy program say little."""
    used = [run["foreign_cores"] for run in runs if run["counted"] and run["foreign_cores"] is not None]
    if not used:
        return "How much other programs ran meanwhile is not known."
    return f"Other programs, idle servers included, used {median(used):.2f} cores (up to {max(used):.2f})."


def _record(record: RequestRecord) -> dict[str, Any]:
    """A request's numbers for the record: of its chunks' times the first is enough."""
    return record_to_json(record) | {"text_times": [round(time, 6) for time in record.text_times[:1]]}


async def inspect_alone(
    server: Server,
    scenarios: Mapping[str, Scenario],
    prompts: ExactPrompts,
    results: Results,
    progress: tqdm[Any],
) -> None:
    """A first round that warms the server up, while its memory is watched; then its idle time."""

    async def one_round() -> None:
        for name, scenario in scenarios.items():
            progress.set_postfix_str(f"{server.name} {name}, not counted")
            await run_once(server, name, scenario, prompts.requests(scenario), results, is_counted=False)
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


def format_comparison(
    values: dict[str, dict[str, list[float]]],
    peers: Iterable[str],
    scenarios: Mapping[str, Scenario],
    share: Callable[[str, str, float], str],
) -> str:
    """The table: a row a number, a column a server; those that are not peers with their ratios to the best.

    Args:
        share: What to print of a server's figure in a scenario beside it.
    """
    titles = {name: (f"{name}  {scenario.title}", scenario.unit) for name, scenario in scenarios.items()}
    lines = []
    for row, (title, unit) in (titles | OTHER_ROWS).items():
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
            if row in scenarios and name in medians:
                cell += share(name, row, medians[name])
            cells.append(cell)
        lines.append(cells)
    return format_table(["", "", *values], lines)


def format_shares(scenario: Scenario, value: float, footprint: Footprint, peaks: Peaks) -> str:
    """The shares of both peaks that a figure means, in percent."""
    read, multiplied = shares(scenario, value, footprint, peaks)
    return f" [{'-' if read is None else round(100 * read)}|{round(100 * multiplied)}]"


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
        "--peer-weights",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="what it reads in each step, for the share of the read bandwidth",
    )
    add(
        "--without-ignore-eos",
        action="append",
        default=[],
        metavar="NAME",
        help="a peer that has no such field",
    )
    add(
        "--scenario",
        nargs="+",
        choices=[*SCENARIOS, *MEASURED_ALONE],
        default=[*DEFAULT_SCENARIOS, *MEASURED_ALONE],
        help="what to run",
    )
    add("--short", action="store_true", help="a sixteenth of the tokens, to try the command out")
    add("--repeat", type=positive_int, default=3, help="counted rounds")
    add("--profile", action="store_true", help="first print the share of a step by operation")
    add("--seed", type=int, default=0, help="of the prompts' words, beside the time")
    add("--output", type=Path, help="JSON with every number")
    options = parser.parse_args(arguments)
    names = [name for name, _, _ in options.peer]
    try:
        options.peer_pid = {name: int(pid) for name, pid in _pairs(options.peer_pid)}
    except ValueError:
        parser.error("--peer-pid must be NAME=PID")
    options.peer_weights = {name: Path(file) for name, file in _pairs(options.peer_weights)}
    for file in options.peer_weights.values():
        if not file.is_file():
            parser.error(f"--peer-weights must be NAME=FILE, and there is no file {file}")
    if unknown := {*options.peer_pid, *options.peer_weights, *options.without_ignore_eos} - {*names}:
        parser.error(f"no --peer is called {', '.join(sorted(unknown))}")
    if not options.quant and not names:
        parser.error("nothing to measure: give --quant or --peer")
    return options


def _pairs(texts: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Names and values of NAME=VALUE; an empty value where there is none."""
    for text in texts:
        name, _, value = text.partition("=")
        yield name, value


def engine_options(options: argparse.Namespace) -> dict[str, list[str]]:
    """The command line of every server of ours, by its name in the table."""
    fixed = ["--model", options.model, "--kv-cache-memory", options.kv_cache_memory]
    fixed += [word for name, value in options.option for word in (f"--{name.replace('_', '-')}", value)]
    return {
        f"{quant} {dtype}": ["--quant", quant, "--kv-cache-dtype", dtype, *fixed]
        for quant in options.quant
        for dtype in options.kv_cache_dtype
    }


def chosen_scenarios(options: argparse.Namespace) -> dict[str, Scenario]:
    """What to run, in the order of the command line."""
    chosen = {name: SCENARIOS[name] for name in options.scenario if name in SCENARIOS}
    if options.short:
        return {name: scenario.shortened() for name, scenario in chosen.items()}
    return chosen


async def run_benchmark(options: argparse.Namespace, results: Results) -> dict[str, Any]:
    """Run everything; returns what there is to say of the servers."""
    tokenizer = load_tokenizer(resolve_model(options.model))
    prompts = ExactPrompts(tokenizer, f"{options.seed} {time.time_ns()}")
    engines, scenarios = engine_options(options), chosen_scenarios(options)
    num_starts = options.repeat + 1 if "start" in options.scenario else int("memory" in options.scenario)
    num_runs = len(scenarios) * (options.repeat + ("memory" in options.scenario)) + 1

    async with AsyncExitStack() as stack:
        total = (len(engines) + len(options.peer)) * num_runs + len(engines) * num_starts
        progress = stack.enter_context(tqdm(total=total, unit="run"))
        peers = []
        for name, base_url, model in options.peer:
            eos = tokenizer.eos_token_ids if name in options.without_ignore_eos else None
            client = await stack.enter_async_context(PeerClient(base_url, model, eos))
            await client.find_model()
            peers.append(Server(name, base_url, client, options.peer_pid.get(name)))

        for repetition in range(num_starts):  # the first start fills the cache
            for name, command in engines.items():
                progress.set_postfix_str(f"start of {name}")
                async with running_engine(name, command) as server:
                    if repetition and server.start_seconds is not None:
                        results.add(name, "start", server.start_seconds)
                    progress.update()
                    if "memory" in options.scenario and repetition == num_starts - 1:
                        await inspect_alone(server, scenarios, prompts, results, progress)
        if "memory" in options.scenario:
            for server in peers:
                await inspect_alone(server, scenarios, prompts, results, progress)

        if scenarios:
            servers = []
            for name, command in engines.items():
                progress.set_postfix_str(f"start of {name}")
                servers.append(await stack.enter_async_context(running_engine(name, command)))
            await run_rounds([*servers, *peers], scenarios, options.repeat, prompts, results, progress)
        return {
            "engines": engines,
            "peers": {
                server.name: {"base_url": server.base_url, "version": server_version(server.base_url)}
                for server in peers
            },
        }


async def run_rounds(
    servers: Sequence[Server],
    scenarios: Mapping[str, Scenario],
    repeat: int,
    prompts: ExactPrompts,
    results: Results,
    progress: tqdm[Any],
) -> None:
    """The runs that count: in each round every scenario on every server, another one first each time."""
    name, scenario = next(iter(scenarios.items()))
    for server in servers:  # what a server does once, it does before
        first_run = scenario.shortened()
        await run_once(server, name, first_run, prompts.requests(first_run), results, is_counted=False)
        progress.update()
    for repetition in range(repeat):
        first = repetition % len(servers)
        for name, scenario in scenarios.items():
            requests = prompts.requests(scenario)
            for server in (*servers[first:], *servers[:first]):
                progress.set_postfix_str(f"{server.name} {name}")
                await asyncio.sleep(_PAUSE_SECONDS)
                await run_once(server, name, scenario, requests, results, is_counted=True)
                progress.update()


def read_footprints(options: argparse.Namespace) -> dict[str, Footprint]:
    """What each server's model asks of the machine, by the server's name."""
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    found = {}
    for name, command in engine_options(options).items():
        known, _ = parser.parse_known_args(command)  # others are the HTTP server's
        found[name] = footprint_of_engine(EngineConfig(**vars(known)))
    for name, _, _ in options.peer:
        found[name] = footprint_of_peer(options.model, options.peer_weights.get(name))
    return found


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


def _try_peaks() -> Peaks | None:
    try:
        return measure_peaks()
    except EngineError as error:
        print(f"no shares of peaks: {error}")
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every request succeeded, 1 if one failed, 2 if a server could not be used."""
    options = parse_arguments(arguments)
    result = {"benchmark": "cpu"} | describe_run(sys.argv[1:] if arguments is None else arguments)
    scenarios, results = chosen_scenarios(options), Results()
    if options.profile:
        print_profiles(options)
    try:
        footprints, peaks = read_footprints(options), _try_peaks()
        result |= {
            "peaks": None if peaks is None else asdict(peaks),
            "footprints": {name: asdict(footprint) for name, footprint in footprints.items()},
        }
        try:
            result |= asyncio.run(run_benchmark(options, results))
        except KeyboardInterrupt:
            results.errors.append("interrupted; what was measured until then follows")
    except (ServerError, EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def share(server: str, name: str, value: float) -> str:
        return "" if peaks is None else format_shares(scenarios[name], value, footprints[server], peaks)

    print(f"{DEFINITIONS}\n")
    if peaks is not None:
        print(
            f"Memory gives {peaks.bytes_per_second / 1e9:.1f} GB/s, all threads make "
            f"{peaks.products_per_second / 1e9:.0f} G multiply-adds/s.\n"
        )
    print(format_comparison(results.values, [name for name, _, _ in options.peer], scenarios, share))
    print(f"\n{disturbance(results.runs)}")
    for problem in results.errors:
        print(f"failed: {problem}")
    if options.output is not None:
        result |= {"values": results.values, "errors": results.errors, "runs": results.runs}
        write_json(options.output, result)
    return 1 if results.errors else 0


if __name__ == "__main__":
    sys.exit(main())
