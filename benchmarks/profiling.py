"""Where the time goes: operations of a prefill and of decode steps, by torch's profiler and the C kernels' clock."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.offline import generate_seconds
from benchmarks.report import format_table
from engine import LLM
from engine.executor.cpu_executor import CpuExecutor

_SHOWN_OPERATORS = 12


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator's share of a phase; `seconds` without the operators it calls, `calls` of a C kernel a step."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PhaseProfile:
    """What a phase spent its time on.

    Attributes:
        name: "prefill" or "decode".
        plain_seconds: The phase's time on its own.
        profiled_seconds: Its time under the profiler, which slows down phases of many small operators.
        operators: The costliest first.
        other_seconds: Profiled time outside any operator: scheduler, Python, the profiler itself. On a GPU,
            where operators run beside the host, None.
    """

    name: str
    plain_seconds: float
    profiled_seconds: float
    operators: list[Operator]
    other_seconds: float | None


def _profile_phase(
    name: str, llm: LLM, plain_prompts: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], tokens: int
) -> PhaseProfile:
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    plain_seconds = generate_seconds(llm, plain_prompts, tokens)
    executor = llm.core.model.runner.executor
    if isinstance(executor, CpuExecutor):
        executor.seconds = torch.zeros(len(executor.program.names), dtype=torch.float64)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        generate_seconds(llm, prompts, tokens)
        profiled_seconds = time.perf_counter() - start
    operators = _program_operators(executor) if isinstance(executor, CpuExecutor) else []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            operators.append(Operator(event.key, event.count, microseconds / 1e6))
    operators.sort(key=lambda operator: operator.seconds, reverse=True)
    busy = sum(operator.seconds for operator in operators)
    return PhaseProfile(
        name,
        plain_seconds,
        profiled_seconds,
        operators,
        None if on_gpu else max(0.0, profiled_seconds - busy),
    )


def _program_operators(executor: CpuExecutor) -> list[Operator]:
    """The C kernels by their names; ends the measurement."""
    assert executor.seconds is not None
    totals: dict[str, float] = defaultdict(float)
    for name, seconds in zip(executor.program.names, executor.seconds.tolist(), strict=True):
        totals[name] += seconds
    executor.seconds = None
    calls = Counter(executor.program.names)
    return [Operator(f"C: {name}", calls[name], seconds) for name, seconds in totals.items()]


def profile_phases(
    llm: LLM, make_prompts: Callable[[], list[list[int]]], decode_tokens: int
) -> list[PhaseProfile]:
    """Profile a prefill and, over the same prompts, decode steps.

    The decode finds its prompts in the prefix cache that the prefill filled; without prefix caching it
    includes a prefill.

    Args:
        make_prompts: Gives a batch of fresh prompts at every call.
        decode_tokens: Tokens a prompt to decode; reading the profile takes far longer than the steps.
    """
    plain_prompts, prompts = make_prompts(), make_prompts()
    return [
        _profile_phase("prefill", llm, plain_prompts, prompts, 1),
        _profile_phase(f"decode of {decode_tokens} tokens", llm, plain_prompts, prompts, decode_tokens),
    ]


def format_operators(phase: PhaseProfile) -> str:
    """The costliest operators of a phase with their share of its profiled time."""
    entries = [(operator.name, str(operator.calls), operator.seconds) for operator in phase.operators]
    shown, rest = entries[:_SHOWN_OPERATORS], entries[_SHOWN_OPERATORS:]
    if rest:
        shown.append((f"{len(rest)} other operators", "", sum(seconds for _, _, seconds in rest)))
    if phase.other_seconds is not None:
        shown.append(("outside operators", "", phase.other_seconds))
    whole = sum(seconds for _, _, seconds in shown)
    return (
        f"{phase.name}: {phase.plain_seconds * 1e3:.0f} ms, "
        f"{phase.profiled_seconds * 1e3:.0f} ms under the profiler\n"
    ) + format_table(
        ["operator", "calls", "ms", "share"],
        [
            [name[:60], calls, f"{seconds * 1e3:.1f}", f"{seconds / whole:.1%}"]
            for name, calls, seconds in shown
        ],
    )
