"""The long form: 200 requests, with 20 kills of one engine, and again with 20 of an engine and its ranks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import describe_run
from benchmarks.report import write_json
from tests.chaos.load import plan_requests
from tests.chaos.run import Outcome, run
from tests.chaos.server import running_server

MORE_BYTES = 128 * 2**20
"""What an API process may hold more: the last engines' objects are there until Python looks for cycles."""


def problems(outcome: Outcome, num_kills: int, idle: dict[str, float]) -> list[str]:
    """What misses a bar, in a line each."""
    found = list(outcome.faults)
    if len(outcome.deaths) < num_kills:
        found.append(f"{len(outcome.deaths)} kills instead of {num_kills}: the requests ended before")
    before, after = outcome.before, outcome.after
    for what, earlier, later in (
        ("processes", before.num_processes, after.num_processes),
        ("descriptors", before.num_descriptors, after.num_descriptors),
        ("files in /dev/shm", len(before.shared_files), len(after.shared_files)),
        ("private bytes", before.private_bytes + MORE_BYTES, after.private_bytes),
    ):
        if later > earlier:
            found.append(f"the server holds {later} {what}, and {earlier} are allowed")
    found += [f"{name} is {value} when nothing runs" for name, value in idle.items() if value]
    shares = outcome.shares_of_allowed()
    if shares and (share := shares[int(0.95 * (len(shares) - 1))]) > 1.0:
        found.append(f"the 95th percentile of gaps is {share:.2f} times what is allowed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "kills", **describe_run(sys.argv[1:])}
    requests = plan_requests(args.requests, requests_per_second=2.0, seed=args.seed)
    num_problems = 0
    for sizes in ((), ("--tensor-parallel-size", "3")):
        options = ["--model", args.model, "--quant", "int8", "--max-restarts", str(args.kills + 1), *sizes]
        with running_server(options) as server, tqdm(total=2 * len(requests), unit="request") as bar:
            outcome = run(server, requests, args.kills, seed=args.seed, on_end=bar.update)
            idle = {
                name: server.metric(f"engine_{name}")
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            }
        found = problems(outcome, args.kills, idle)
        num_problems += len(found)
        print(f"\n{' '.join(options)}\nfirst start {server.start_seconds:.2f} s\n{outcome}\n{idle}")
        print(*found, sep="\n", flush=True)
        result["several ranks" if sizes else "one rank"] = {
            "options": options,
            "start_seconds": server.start_seconds,
            **outcome.figures(),
            "idle": idle,
            "problems": found,
        }
        if args.output is not None:
            write_json(args.output, result)
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
