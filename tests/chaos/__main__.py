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
from tests.chaos.run import run
from tests.chaos.server import running_server


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
    num_faults = 0
    for sizes in ((), ("--tensor-parallel-size", "3")):
        options = ["--model", args.model, "--quant", "int8", "--max-restarts", str(args.kills + 1), *sizes]
        with running_server(options) as server, tqdm(total=2 * len(requests), unit="request") as bar:
            outcome = run(server, requests, args.kills, seed=args.seed, on_end=bar.update)
            idle = {
                name: server.metric(f"engine_{name}")
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            }
        print(
            f"\n{' '.join(options)}\nfirst start {server.start_seconds:.2f} s\n{outcome}\n{idle}", flush=True
        )
        num_faults += len(outcome.faults)
        result["several ranks" if sizes else "one rank"] = {
            "options": options,
            "start_seconds": server.start_seconds,
            **outcome.figures(),
            "idle": idle,
        }
    if args.output is not None:
        write_json(args.output, result)
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
