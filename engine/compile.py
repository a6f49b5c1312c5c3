"""python -m engine.kernels.compile --arch sm_90 --model llama --quant int4

compiles every kernel that the engine can launch for a model, prints a table, and exits with 1 if one of them
spills registers or asks for more memory than the chip has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.executor.warmup import record_launches
from engine.kernels.compilation import Examination, check_arch, compile_launches
from engine.kernels.launch import TARGETS, Launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 if a kernel has problems; 2 if none could be compiled."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.kernels.compile",
        description="Compile every kernel that the engine can launch for a model; no GPU is needed.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--arch", required=True, choices=TARGETS, help="chip to compile for")
    parser.add_argument("--json", type=Path, default=None, help="file that takes the results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    group = parser.add_argument_group("options of the engine, as for engine.serve")
    group.add_argument("--model", required=True)
    group.add_argument("--quant")
    group.add_argument("--kv-cache-dtype")
    group.add_argument("--deterministic", action="store_true")
    options = vars(parser.parse_args(arguments))
    arch, file, jobs = (options.pop(name) for name in ("arch", "json", "jobs"))
    try:
        check_arch(arch)
        config = EngineConfig.from_options(**options)
        launches = record_launches(config, arch)
        done = tqdm(compile_launches(launches, arch, jobs), total=len(launches), desc=arch, unit="kernel")
        results = sorted(done, key=lambda result: _order(result[0]))
    except EngineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if file is not None:
        file.write_text(json.dumps(_report(results, arch, options), indent=1, default=str) + "\n")
    print(_table(results))
    found = [
        f"{launch.name} ({_constants(launch, None)}): {problem}"
        for launch, result in results
        for problem in result.problems
    ]
    print(f"kernels: {len(results)} for {arch} with Triton {triton.__version__}; problems: {len(found)}")
    for line in found:
        print(line)
    return 1 if found else 0


def _order(launch: Launch) -> tuple[str, str]:
    return launch.name, str((launch.arguments, launch.constants, launch.num_warps, launch.num_stages))


def _properties(launch: Launch) -> dict[str, Any]:
    types = {name: type for name, type in launch.arguments if type.startswith("*")}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return {**types, **dict(launch.constants), **options}


def _constants(launch: Launch, names: set[str] | None) -> str:
    """A launch's properties as text: those that are named, or all."""
    return " ".join(
        f"{name}={value}" for name, value in _properties(launch).items() if names is None or name in names
    )


def _table(results: Sequence[tuple[Launch, Examination]]) -> str:
    """A line a launch, with those properties in which the launches of a kernel differ."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for launch, _ in results:
        for name, value in _properties(launch).items():
            values[launch.name, name].add(str(value))
    header = f"{'registers':>9} {'spills':>6} {'shared KiB':>10} {'matrix':>6} {'16-byte':>7} {'narrow':>6}  kernel"
    lines = [header]
    for launch, result in results:
        differing = {name for name in _properties(launch) if len(values[launch.name, name]) > 1}
        r = result.resources
        if r is None:
            cells = f"{'not compiled':<49}"
        else:
            cells = (
                f"{r.registers:>9} {r.spills:>6} {r.shared_bytes / 1024:>10.1f} "
                f"{r.matrix_instructions:>6} {r.wide_loads:>7} {r.narrow_loads:>6}"
            )
        lines.append(f"{cells}  {launch.name} {_constants(launch, differing)}".rstrip())
    return "\n".join(lines)


def _report(
    results: Sequence[tuple[Launch, Examination]], arch: str, options: dict[str, Any]
) -> dict[str, Any]:
    kernels = [
        {
            "kernel": launch.name,
            "arguments": dict(launch.arguments),
            "aligned": launch.aligned,
            "constants": dict(launch.constants),
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "resources": dataclasses.asdict(result.resources) if result.resources else None,
            "problems": result.problems,
        }
        for launch, result in results
    ]
    return {"arch": arch, "triton": triton.__version__, **options, "kernels": kernels}


if __name__ == "__main__":
    sys.exit(main())
