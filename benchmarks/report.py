"""Tables for the terminal and JSON for the record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.metrics import Distribution, RequestRecord, Summary


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column flush left, the others flush right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *rows)
    )


def _milliseconds(distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return ["-"] * 4
    values = (distribution.mean, distribution.p50, distribution.p90, distribution.p99)
    return [f"{value * 1e3:.1f}" for value in values]


def format_summary(title: str, summary: Summary) -> str:
    """One scenario's latencies and rates."""
    latencies = {"TTFT": summary.ttft, "ITL": summary.itl, "TPOT": summary.tpot, "E2E": summary.e2e}
    if summary.lateness is not None:
        latencies["sent late by"] = summary.lateness
    table = format_table(
        ["ms", "mean", "p50", "p90", "p99"],
        [[name, *_milliseconds(distribution)] for name, distribution in latencies.items()],
    )
    rates = [
        f"{summary.requests_per_second:.2f} req/s",
        f"output {summary.output_tokens_per_second:.1f} tok/s",
        f"total {summary.total_tokens_per_second:.1f} tok/s",
    ]
    if summary.prefill_tokens_per_second is not None:
        rates.append(f"prefill {summary.prefill_tokens_per_second:.0f} tok/s")
    if summary.decode_tokens_per_second is not None:
        rates.append(f"decode {summary.decode_tokens_per_second:.1f} tok/s")
    counts = [
        f"{summary.num_requests} requests, {summary.num_failed} failed",
        f"{summary.input_tokens} input tokens, {summary.cached_tokens} of them cached",
        f"{summary.output_tokens} output tokens",
        f"{summary.duration:.1f} s",
    ]
    return "\n".join([title, table, " | ".join(rates), " | ".join(counts)])


def record_to_json(record: RequestRecord) -> dict[str, Any]:
    """One request's raw numbers; seconds, rounded to a microsecond."""
    return {
        "scheduled": record.scheduled,
        "start": round(record.start, 6),
        "end": round(record.end, 6),
        "text_times": [round(time, 6) for time in record.text_times],
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "cached_tokens": record.cached_tokens,
        "error": record.error,
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result, one key a line but numbers side by side, so that files diff and stay small."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
