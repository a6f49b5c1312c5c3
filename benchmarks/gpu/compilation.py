"""Compiles in parallel, before anything is timed, what the timed kernels and engines launch."""

from __future__ import annotations

import os
from functools import partial

import torch

from benchmarks.gpu import end_to_end
from benchmarks.gpu.kernels import OTHER_CASES, TARGET_CASES, CaseMaker
from benchmarks.gpu.steps import Skipped, Step, Values
from engine.executor.warmup import record_launches
from engine.kernels.compilation import compile_launches
from engine.kernels.launch import TARGETS, Launch, Target, recording, target_of


def record_cases(target: Target, makers: list[CaseMaker]) -> set[Launch]:
    """What our calls of these cases launch, without data."""
    with recording(target) as launches:
        for make in makers:
            for case in make(torch.device("meta")):
                for name in ("ours", "batch_invariant"):
                    if name in case.calls:
                        case.calls[name]()[0]()
    return launches


def record_engines(target: Target) -> set[Launch]:
    """What the measured engines launch; a layer stands for all."""
    path = end_to_end.write_config(end_to_end.LLAMA_CONFIG | {"num_hidden_layers": 1})
    launches = set[Launch]()
    for quant in end_to_end.QUANTS:
        launches |= record_launches(end_to_end.make_config(path, quant), target.arch)
    return launches


def _compile(jobs: int) -> Values:
    target = target_of(torch.empty(0, device="cuda"))
    if target is None or target.arch not in TARGETS:
        raise Skipped(f"kernels are compiled ahead for {', '.join(TARGETS)}")
    launches = record_cases(target, [*TARGET_CASES.values(), *OTHER_CASES.values()]) | record_engines(target)
    problems = [
        f"{launch.name}: {problem}"
        for launch, result in compile_launches(launches, target.arch, jobs)
        for problem in result.problems
    ]
    assert not problems, f"{len(problems)} of {len(launches)} kernels: {problems[0]}"
    return {"kernels": len(launches)}


def compilation_steps() -> list[Step]:
    jobs = max(1, (os.cpu_count() or 1) // 2)
    return [Step("compilation", "timed kernels, without spills", partial(_compile, jobs))]
