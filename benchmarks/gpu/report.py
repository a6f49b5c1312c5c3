"""What the check prints: a page of tables that fits into a message."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.kernels import TARGET_CASES
from benchmarks.gpu.registry import CHECKS
from benchmarks.gpu.steps import Result
from benchmarks.report import format_table

MAX_CHARACTERS = 9800
MAX_PROBLEMS = 12
MAX_DETAIL = 150

NOMINAL_BANDWIDTH = 3.35e12
"""Bytes a second of an H100 (SXM), for which the targets are stated."""

NOMINAL_TOKENS = {"int4": 704.0, "int8": 417.0, "none": 223.0}
"""The targets' bound of decode, tokens a second."""

LIBRARIES = ("cuBLAS", "int_mm", "tinygemm", "SDPA flash", "SDPA cuDNN", "SDPA efficient", "flex", "torch")
SHORT = {"tinygemm": "tiny", "SDPA flash": "flash", "SDPA cuDNN": "cuDNN", "SDPA efficient": "effic."}

Rows = dict[tuple[str, str], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Target:
    """A target of the issue beside what was measured; None where it was not."""

    name: str
    wanted: str
    measured: str
    is_met: bool | None


def ceilings(results: Iterable[Result]) -> dict[str, float]:
    """Bytes, or operations, a second by kind: copy, bf16, int8."""
    factors = {"copy": 1e9, "bf16": 1e12, "int8": 1e12}
    return {
        result.name: result.values["value"] * factors[result.name]
        for result in results
        if result.group == "ceilings" and result.status == "passed"
    }


def timings(results: Iterable[Result]) -> Rows:
    """By kernel and shape, the rows of `measure`."""
    return {
        (r.group, r.name): sorted(r.values["rows"], key=lambda row: int(row["size"]))
        for r in results
        if "rows" in r.values
    }


def library_seconds(row: dict[str, Any]) -> float | None:
    """The best of the libraries that do the same work."""
    times = [row[name] for name in LIBRARIES if name in row]
    return min(times) if times else None


def share_of_ceiling(row: dict[str, Any], limits: dict[str, float]) -> float | None:
    """The time that the card's ceilings allow as a share of the time that it took."""
    if not limits.get("copy") or (row["operations"] and not limits.get(row["unit"])):
        return None
    compute = row["operations"] / limits[row["unit"]] if row["operations"] else 0.0
    return max(row["bytes"] / limits["copy"], compute) / float(row["ours"])


def _at(rows: Rows, key: tuple[str, str], size: int) -> dict[str, Any] | None:
    return next((row for row in rows.get(key, []) if row["size"] == size), None)


def _speedup(rows: Rows, group: str, sizes: Sequence[int]) -> float | None:
    """The smallest ratio to cuBLAS over these numbers of tokens; None unless all were measured."""
    found = [_at(rows, (group, "8192x8192"), size) for size in sizes]
    ratios = [row["cuBLAS"] / row["ours"] for row in found if row and "cuBLAS" in row]
    return min(ratios) if len(ratios) == len(sizes) else None


def _target(name: str, wanted: float, measured: float | None, unit: str, at_most: bool = False) -> Target:
    def text(value: float) -> str:
        return f"{value:.0%}" if unit == "%" else f"{value:.2f}x" if unit == "x" else f"{value:.0f} {unit}"

    sign = "<=" if at_most else ">="
    if measured is None:
        return Target(name, f"{sign} {text(wanted)}", "-", None)
    is_met = measured <= wanted if at_most else measured >= wanted
    return Target(name, f"{sign} {text(wanted)}", text(measured), is_met)


def targets(results: Sequence[Result]) -> list[Target]:
    """The issue's table, in its order."""
    rows, limits = timings(results), ceilings(results)
    found = [
        _target(
            "int4 8192x8192 M 1-16 / cuBLAS bf16", 2.5, _speedup(rows, "int4 g128", (1, 2, 4, 8, 16)), "x"
        )
    ]
    for size, wanted in ((32, 2.2), (64, 1.7), (128, 1.2)):
        ratio = _speedup(rows, "int4 g128", (size,))
        found.append(_target(f"int4 8192x8192 M {size} / cuBLAS bf16", wanted, ratio, "x"))
    ratio = _speedup(rows, "int8 one term", (1024, 4096))
    found.append(_target("int8 one term M 1024, 4096 / cuBLAS bf16", 1.6, ratio, "x"))
    decode = _at(rows, ("decode attention 8K", "kv bf16"), 32)
    share = decode["bytes"] / decode["ours"] / limits["copy"] if decode and "copy" in limits else None
    found.append(_target("decode attention 8K batch 32 / copy bandwidth", 0.85, share, "%"))
    prefill = _at(rows, ("prefill attention 4K", "causal"), 1)
    best = library_seconds(prefill) if prefill else None
    ratio = best / prefill["ours"] if prefill and best else None
    found.append(_target("prefill attention 4K / best SDPA", 0.7, ratio, "%"))
    for quant, bound in NOMINAL_TOKENS.items():
        single = next((r.values for r in _of(results, "decode", quant) if r.values.get("batch") == 1), None)
        name = f"8B {_quant(quant)} batch 1 decode (75% of {bound:.0f})"
        found.append(_target(name, 0.75 * bound, single["tok/s"] if single else None, "tok/s"))
    for quant in NOMINAL_TOKENS:
        outside = next(
            (r.values for r in _of(results, "outside kernels", quant) if "share" in r.values), None
        )
        name = f"8B {_quant(quant)} batch 32, outside kernels"
        found.append(_target(name, 0.05, outside["share"] if outside else None, "%", at_most=True))
    return found


def _of(results: Iterable[Result], group: str, quant: str) -> list[Result]:
    return [r for r in results if r.group == group and r.section == f"engine {quant}"]


def _quant(quant: str) -> str:
    return "bf16" if quant == "none" else quant


def _checks(results: Sequence[Result]) -> list[str]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.section in CHECKS or result.group == "compiled while serving":
            groups[result.group].append(result)
    body = []
    for group, members in groups.items():
        count = [
            sum(r.status == status for r in members) for status in ("passed", "failed", "skipped", "not run")
        ]
        errors = [r.values["error"] for r in members if "error" in r.values]
        body.append([group, *(str(n) if n else "-" for n in count), f"{max(errors):.2f}" if errors else "-"])
    return [format_table(["check", "passed", "failed", "skipped", "not run", "error/bound"], body)]


def _problems(results: Sequence[Result]) -> list[str]:
    failed = [r for r in results if r.status == "failed"]
    lines = [f"FAILED {r.section}: {r.name}: {_cut(r.detail)}" for r in failed[:MAX_PROBLEMS]]
    if len(failed) > MAX_PROBLEMS:
        lines.append(f"FAILED {len(failed) - MAX_PROBLEMS} more; see the JSON")
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for result in results:
        if result.status in ("skipped", "not run"):
            reasons[result.status, result.detail].append(f"{result.section}: {result.name}")
        for name, reason in result.values.get("left out", {}).items():
            reasons["skipped", reason].append(f"{result.group} {name}")
    shown = list(reasons.items())[:MAX_PROBLEMS]
    for (status, reason), names in shown:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{status}: {_cut(', '.join(names[:3]))}{more}: {_cut(reason)}")
    if len(reasons) > MAX_PROBLEMS:
        lines.append(f"{len(reasons) - MAX_PROBLEMS} more reasons to skip; see the JSON")
    return lines


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_DETAIL else line[: MAX_DETAIL - 3] + "..."


def _ratio(row: dict[str, Any], name: str) -> str:
    return f"{row[name] / row['ours']:.2f}" if name in row else "-"


def _kernels(results: Sequence[Result]) -> list[str]:
    """Tables of the kernels that targets are about, a line a figure; then a line a kernel for the others."""
    rows, limits = timings(results), ceilings(results)
    full = [
        key for key in rows if key in TARGET_CASES or (key[0].startswith("int8") and "8192x8192" in key[1])
    ]
    tables = [
        "\n".join([" ".join(key), format_table(["", *(str(row["size"]) for row in rows[key])], body)])
        for key in full
        if (body := _lines(rows[key], limits))
    ]
    by_sizes: dict[tuple[int, ...], list[list[str]]] = defaultdict(list)
    for key, measured in rows.items():
        if key not in full:
            cells = [_cell(row, limits) for row in measured]
            by_sizes[tuple(row["size"] for row in measured)].append([" ".join(key), *cells])
    header = "us/% ceil/x best library"
    return tables + [format_table([header, *map(str, sizes)], body) for sizes, body in by_sizes.items()]


def _cell(row: dict[str, Any], limits: dict[str, float]) -> str:
    """Microseconds, the share of the ceiling and the ratio to the best library, in short."""
    best = library_seconds(row)
    ratio = f"{best / row['ours']:.2f}" if best else "-"
    return f"{_three_digits(row['ours'] * 1e6)}/{_percent(row, limits)}/{ratio}"


def _percent(row: dict[str, Any], limits: dict[str, float]) -> str:
    share = share_of_ceiling(row, limits)
    return "-" if share is None else f"{share:.0%}"


def _lines(rows: Sequence[dict[str, Any]], limits: dict[str, float]) -> list[list[str]]:
    def line(label: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [f" {label}", *(cell(row) for row in rows)]

    present = [name for name in LIBRARIES if any(name in row for row in rows)]
    lines = [
        line("us", lambda row: _three_digits(row["ours"] * 1e6)),
        line("GB/s", lambda row: f"{row['bytes'] / row['ours'] / 1e9:.0f}"),
        line("TFLOP/s", lambda row: _three_digits(row["operations"] / row["ours"] / 1e12)),
        line("% ceil", partial(_percent, limits=limits)),
        *(line(f"x {SHORT.get(name, name)}", partial(_ratio, name=name)) for name in present),
    ]
    if any("batch_invariant" in row for row in rows):
        lines.append(
            line(
                "pinned us",
                lambda row: _three_digits(row["batch_invariant"] * 1e6) if "batch_invariant" in row else "-",
            )
        )
    return lines


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _end_to_end(results: Sequence[Result]) -> list[str]:
    copy = ceilings(results).get("copy")
    body, notes = [], []
    for quant in NOMINAL_TOKENS:
        for result in _of(results, "decode", quant):
            v = result.values
            if "tok/s" not in v:
                continue
            bound = [
                v["batch"] * speed / v["bytes"] if speed else None for speed in (copy, NOMINAL_BANDWIDTH)
            ]
            shares = [f"{v['tok/s'] / b:.0%}" if b else "-" for b in bound]
            cells = [f"{v['tok/s']:.0f}", f"{v['step'] * 1e3:.2f}", f"{v['bytes'] / 1e9:.2f}"]
            body.append([f"{_quant(quant)} batch {v['batch']}", *cells, *shares])
        notes += _notes(results, quant)
    header = ["8B decode", "tok/s", "ms/step", "GB/step", "of copy", "of 3.35 TB/s"]
    return ([format_table(header, body)] if body else []) + notes


def _notes(results: Sequence[Result], quant: str) -> list[str]:
    notes = []
    limit = ceilings(results)
    for result in _of(results, "prefill", quant):
        v = result.values
        if "tok/s" in v:
            text = f"{_quant(quant)} prefill {v['prompts']}x{v['length']}: {v['tok/s']:.0f} tok/s"
            if "bf16" in limit:
                bound = (v["weight operations"] + v["attention operations"]) / limit["bf16"]
                text += f", {bound / v['seconds']:.0%} of the bf16 compute bound"
            notes.append(text)
    for result in _of(results, "outside kernels", quant):
        v = result.values
        if "share" in v:
            text = f"{_quant(quant)} batch {v['batch']}: step {v['step'] * 1e3:.2f} ms,"
            text += f" kernels {v['kernels'] * 1e3:.2f},"
            notes.append(f"{text} forward graph {v['forward'] * 1e3:.2f}: {v['share']:.1%} outside kernels")
    for result in _of(results, "switched off", quant):
        v = result.values
        if "eager" in v:
            rates = ", ".join(
                f"{name} {v[name]:.0f}" for name in ("no overlap", "eager", "eager, no overlap")
            )
            notes.append(f"{_quant(quant)} batch {v['batch']} tok/s: {rates}")
    return notes


def format_report(results: Sequence[Result], machine: dict[str, Any], seconds: float) -> str:
    """All of it, at most MAX_CHARACTERS: the kernels' tables, which the JSON has in full, are cut first."""
    counts = {
        status: sum(r.status == status for r in results)
        for status in ("passed", "failed", "skipped", "not run")
    }
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    head = [
        f"gpu-check: {', '.join(machine.get('gpus', [])) or 'unknown GPU'}; {packages}; {machine.get('date', '')}",
        f"{', '.join(f'{n} {status}' for status, n in counts.items())} in {seconds:.0f} s",
    ]
    units = {"copy": (1e9, "GB/s"), "bf16": (1e12, "TFLOP/s"), "int8": (1e12, "TOP/s")}
    measured = [
        f"{kind} {value / units[kind][0]:.0f} {units[kind][1]}" for kind, value in ceilings(results).items()
    ]
    verdicts = {True: "met", False: "MISSED", None: "not measured"}
    table = format_table(
        ["target", "wanted", "measured", ""],
        [
            [target.name, target.wanted, target.measured, verdicts[target.is_met]]
            for target in targets(results)
        ],
    )
    before = [
        *head,
        "",
        *_checks(results),
        *_problems(results),
        "",
        f"ceilings: {', '.join(measured) or '-'}",
        "",
        table,
    ]
    before += ["", *_end_to_end(results), ""]
    legend = "columns: tokens or sequences; x library: its time / ours; % ceil: of the copy or matmul ceiling"
    kernels = "\n\n".join([legend, *_kernels(results)])
    room = MAX_CHARACTERS - len("\n".join(before))
    if len(kernels) > room:
        note = "\n(cut; the JSON has all)"
        kernels = kernels[: max(0, room - len(note))].rpartition("\n")[0] + note
    return "\n".join([*before, kernels])[:MAX_CHARACTERS]
