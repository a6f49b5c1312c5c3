"""One command on a machine with a GPU: do the kernels compute what they should, and how fast.

    python benchmarks/gpu_check.py --out DIRECTORY

Needs no network and only torch, triton, transformers, safetensors and numpy. Ends within --minutes: checks first,
several at a time, then timings, each with the GPU to itself, in order of importance; what did not fit is listed.
Prints a page; the directory gets gpu-check.json with every number, and each process's output.

Exit status: 0, 1 if a check failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(
        Path(__file__).resolve().parent.parent
    )  # this file's directory has modules of common names

CHECKS_SHARE = 0.42
"""Share of the time after which checks that still run are ended."""

MARGIN_SECONDS = 12.0
"""For what comes after the last section."""


def run(directory: Path, seconds: float) -> dict[str, Any]:
    """Runs every section; the result as it goes into the JSON file."""
    from benchmarks.gpu.registry import CHECKS, OTHER_TIMINGS, TARGET_TIMINGS
    from benchmarks.gpu.report import ceilings, format_report, targets
    from benchmarks.gpu.sections import run_sections
    from benchmarks.machine import describe_run

    begun = time.monotonic()
    about = describe_run(sys.argv[1:])
    cores = os.cpu_count() or 1
    end = begun + seconds - MARGIN_SECONDS
    results = run_sections(
        list(CHECKS),
        directory,
        jobs=max(2, cores - 2),
        deadline=begun + CHECKS_SHARE * seconds,
        num_threads=2,
    )
    for names in (TARGET_TIMINGS, OTHER_TIMINGS):
        results += run_sections(list(names), directory, jobs=1, deadline=end, num_threads=max(1, cores // 2))
    taken = time.monotonic() - begun
    machine = about["machine"] | {"date": about["date"]}
    return about | {
        "seconds": taken,
        "targets": [dataclasses.asdict(target) for target in targets(results)],
        "ceilings": ceilings(results),
        "report": format_report(results, machine, taken),
        "results": [dataclasses.asdict(result) for result in results],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and measure the engine on this machine's GPU.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time that all of it may take (%(default)g)"
    )
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU here; nothing was checked", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options.out.resolve(), 60 * options.minutes)
    (options.out / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result["report"])
    return 1 if any(entry["status"] == "failed" for entry in result["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
