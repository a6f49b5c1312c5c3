"""Runs the steps of one section in a process of their own and writes their results as lines of JSON.

    python -m benchmarks.gpu.worker SECTION FILE [FIRST]

A kernel that reads where it must not ends the CUDA context of its process: `benchmarks.gpu.sections` then starts
another one behind the step that did it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Sequence
from typing import IO

import torch

from benchmarks.gpu.registry import SECTIONS
from benchmarks.gpu.steps import Result, Skipped, Status, Step

LOST_DEVICE = 3
"""Exit status: the step before has left the device unusable."""


def run_step(section: str, step: Step) -> Result:
    """Runs a step, whatever it raises."""
    start = time.perf_counter()
    status: Status = "passed"
    detail, values = "", {}
    try:
        values = step.run()
    except Skipped as reason:
        status, detail = "skipped", str(reason)
    except AssertionError as error:
        status, detail = "failed", str(error) or "assertion failed"
        traceback.print_exc()
    except Exception as error:
        status, detail = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    return Result(section, step.group, step.name, status, detail, time.perf_counter() - start, values)


def run_steps(section: str, steps: Sequence[Step], first: int, file: IO[str]) -> int:
    """Writes what is planned, each step as it begins, and each result; returns the exit status."""

    def write(kind: str, value: object) -> None:
        file.write(json.dumps({kind: value}) + "\n")
        file.flush()

    write("plan", [(step.group, step.name) for step in steps])
    for index, step in enumerate(steps[first:], first):
        write("begin", index)
        result = run_step(section, step)
        write("result", (index, dataclasses.asdict(result)))
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception:
            return LOST_DEVICE
    return 0


def main(arguments: Sequence[str]) -> int:
    section, path, *rest = arguments
    first = int(rest[0]) if rest else 0
    with open(path, "a") as file:
        return run_steps(section, SECTIONS[section](), first, file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
