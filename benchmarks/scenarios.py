"""What a serving benchmark sends: the standard scenarios and the replay of an arrival trace."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.prompts import PromptMaker

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LONG_PREFILL_OUTPUT_TOKENS = 16


class TraceError(ValueError):
    """An arrival trace that cannot be replayed; names the file and line."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request to send.

    Attributes:
        arrival: Seconds since the scenario began; None when a stream is free.
        fields: Of the request's body, beside these; greedy if they name no temperature.
    """

    prompt: str
    max_tokens: int
    arrival: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests and how they are sent.

    Attributes:
        warm_up: Sent and awaited before the others, not counted.
        concurrency: Streams kept busy; None sends every request at its arrival time, however many are open.
        parameters: What to record beside the results.
    """

    name: str
    warm_up: PlannedRequest
    requests: list[PlannedRequest]
    concurrency: int | None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One row of a trace; `time` in seconds since the first row."""

    time: float
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Sizes of the scenarios, in tokens.

    Attributes:
        num_requests: Requests a scenario; None takes each scenario's own number.
        trace: CSV file with the columns of `TRACE_COLUMNS`; needed by the scenario "trace" only.
        trace_requests: Rows to replay, from the first; None for all.
        trace_speedup: Arrival times are divided by this.
        trace_max_context: Longer contexts of the trace are cut to this; None for no cut.
    """

    input_tokens: int = 128
    output_tokens: int = 128
    num_requests: int | None = None
    long_input_tokens: int = 2048
    shared_prefix_tokens: int = 512
    trace: Path | None = None
    trace_requests: int | None = None
    trace_speedup: float = 1.0
    trace_max_context: int | None = None


def read_trace(path: Path, limit: int | None = None) -> list[Arrival]:
    """Read an arrival trace.

    Raises:
        TraceError: If a column is missing, a value cannot be read, times run backwards or no row is there.
    """
    arrivals: list[Arrival] = []
    first: datetime | None = None
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise TraceError(f"{path}: no column {', '.join(missing)}; needed: {','.join(TRACE_COLUMNS)}")
        for row in reader:
            if len(arrivals) == limit:
                break
            try:
                # Digits beyond the microsecond, which these traces carry, are dropped by fromisoformat.
                moment = datetime.fromisoformat(row["TIMESTAMP"])
                first = first or moment
                time = (moment - first).total_seconds()
                arrival = Arrival(time, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            except (TypeError, ValueError) as error:
                raise TraceError(f"{path}, line {reader.line_num}: {error}") from None
            if arrivals and time < arrivals[-1].time:
                raise TraceError(
                    f"{path}, line {reader.line_num}: earlier than the line before; sort the trace"
                )
            arrivals.append(arrival)
    if not arrivals:
        raise TraceError(f"{path}: no rows")
    return arrivals


def _closed(
    name: str, concurrency: int, num_requests: int
) -> Callable[[WorkloadOptions, PromptMaker], Scenario]:
    """A scenario of equal requests over a fixed number of streams."""

    def build(options: WorkloadOptions, prompts: PromptMaker) -> Scenario:
        def request() -> PlannedRequest:
            return PlannedRequest(prompts.make(options.input_tokens), options.output_tokens)

        return Scenario(
            name,
            warm_up=request(),
            requests=[request() for _ in range(options.num_requests or num_requests)],
            concurrency=concurrency,
            parameters={"input_tokens": options.input_tokens, "output_tokens": options.output_tokens},
        )

    return build


def _long_prefill(options: WorkloadOptions, prompts: PromptMaker) -> Scenario:
    def request() -> PlannedRequest:
        return PlannedRequest(prompts.make(options.long_input_tokens), LONG_PREFILL_OUTPUT_TOKENS)

    return Scenario(
        "long-prefill",
        warm_up=request(),
        requests=[request() for _ in range(options.num_requests or 4)],
        concurrency=1,
        parameters={"input_tokens": options.long_input_tokens, "output_tokens": LONG_PREFILL_OUTPUT_TOKENS},
    )


def _shared_prefix(options: WorkloadOptions, prompts: PromptMaker) -> Scenario:
    prefix = prompts.make(options.shared_prefix_tokens)

    def request() -> PlannedRequest:
        return PlannedRequest(f"{prefix} {prompts.make(options.input_tokens)}", options.output_tokens)

    return Scenario(
        "shared-prefix",
        warm_up=request(),
        requests=[request() for _ in range(options.num_requests or 16)],
        concurrency=8,
        parameters={
            "shared_prefix_tokens": options.shared_prefix_tokens,
            "input_tokens": options.input_tokens,
            "output_tokens": options.output_tokens,
        },
    )


def _trace(options: WorkloadOptions, prompts: PromptMaker) -> Scenario:
    if options.trace is None:
        raise TraceError("the scenario trace needs --trace FILE")

    def request(arrival: Arrival) -> PlannedRequest:
        context = max(1, min(arrival.context_tokens, options.trace_max_context or arrival.context_tokens))
        time = arrival.time / options.trace_speedup
        return PlannedRequest(prompts.make(context), max(1, arrival.generated_tokens), time)

    arrivals = read_trace(options.trace, options.trace_requests)
    return Scenario(
        "trace",
        warm_up=request(arrivals[0]),
        requests=[request(arrival) for arrival in arrivals],
        concurrency=None,
        parameters={
            "trace": options.trace.name,
            "speedup": options.trace_speedup,
            "max_context": options.trace_max_context,
        },
    )


SCENARIOS: dict[str, Callable[[WorkloadOptions, PromptMaker], Scenario]] = {
    "single": _closed("single", concurrency=1, num_requests=8),
    "concurrent-8": _closed("concurrent-8", concurrency=8, num_requests=24),
    "concurrent-32": _closed("concurrent-32", concurrency=32, num_requests=64),
    "long-prefill": _long_prefill,
    "shared-prefix": _shared_prefix,
    "trace": _trace,
}
