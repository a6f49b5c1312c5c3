"""What comes of a comparison: a table in Markdown, JSON, and plots of quality against size and speed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from engine.config import format_bytes
from engine.installation import missing_package
from engine.quality.measure import Measurement
from engine.quality.metrics import median_divergence, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import BboxBase

LABEL_LENGTH = 40
"""Longer names show their ends."""

DPI = 150

DEFINITIONS = """\
- a (b–c): mean, least and most of the calibrations with different seeds
- bits/weight: bits of all that is stored for the weights, embeddings and scales included, by the number of weights
- perplexity: exp of the mean of -log p(token), each token after the first scored once in a sliding window
- KL: mean KL(reference || variant) of the next-token distributions, in nats
- top-1: share of tokens before which both hold the same token the likeliest
- same tokens: greedy tokens in common with the reference before the first that differs, median over the prompts
- memory: most that the process held while it generated, pages of the mapped weights file included; loading is not
- decode, prefill: tokens/s of one sequence, the decode right after the prefill; median of the runs"""


SPREAD = ("perplexity", "kl_divergence", "agreement", "first_divergence")
"""Measures whose least and most are told where there are several calibrations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A row of the table; fields as in `engine.quality.measure.Measurement`, means over the calibrations.

    Attributes:
        first_divergence: Median over the prompts, of the reference's tokens.
        peak_bytes: The most of any calibration.
        seeds: Of the calibrations; one of them stands for none, too.
        spread: Least and most of each measure of `SPREAD`.
    """

    variant: str
    bits_per_weight: float
    perplexity: float
    kl_divergence: float
    agreement: float
    first_divergence: float
    peak_bytes: int | None
    decode_rate: float
    prefill_rate: float
    seeds: Sequence[int]
    spread: Mapping[str, Sequence[float]]


def summarize(variant: str, measurements: Mapping[int, Measurement], reference: Measurement) -> Result:
    """The row of a variant.

    Args:
        measurements: By the calibration's seed; at least one.
    """
    rows = list(measurements.values())
    divergences = [median_divergence(reference.continuations, row.continuations) for row in rows]
    values = {name: [getattr(row, name) for row in rows] for name in SPREAD if name != "first_divergence"}
    values["first_divergence"] = divergences
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    return Result(
        variant=variant,
        **{name: mean(values[name]) for name in SPREAD},
        bits_per_weight=mean(row.bits_per_weight for row in rows),
        peak_bytes=max(peaks, default=None),
        decode_rate=mean(row.decode_rate for row in rows),
        prefill_rate=mean(row.prefill_rate for row in rows),
        seeds=list(measurements),
        spread={name: [min(values[name]), max(values[name])] for name in SPREAD},
    )


def _with_spread(result: Result, name: str, form: str) -> str:
    """The mean, and what lies around it."""
    shown = format(getattr(result, name), form)
    if len(result.seeds) == 1:
        return shown
    low, high = result.spread[name]
    return f"{shown} ({low:{form}}–{high:{form}})"


COLUMNS: dict[str, Callable[[Result], str]] = {
    "variant": lambda result: f"`{result.variant}`",
    "bits/weight": lambda result: f"{result.bits_per_weight:.2f}",
    "perplexity": lambda result: _with_spread(result, "perplexity", ".3f"),
    "KL": lambda result: _with_spread(result, "kl_divergence", ".5f"),
    "top-1": lambda result: _with_spread(result, "agreement", ".2%"),
    "same tokens": lambda result: f"{result.first_divergence:g}",
    "memory": lambda result: "-" if result.peak_bytes is None else format_bytes(result.peak_bytes),
    "decode tok/s": lambda result: f"{result.decode_rate:.1f}",
    "prefill tok/s": lambda result: f"{result.prefill_rate:.0f}",
}


def format_table(results: Sequence[Result]) -> str:
    """The results as a Markdown table, a line each."""
    lines = [list(COLUMNS), *([cell(result) for cell in COLUMNS.values()] for result in results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]

    def joined(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    shown = [
        joined(
            [
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
        )
        for line in lines
    ]
    rule = joined(["-" * (width - 1) + (":" if column else "-") for column, width in enumerate(widths)])
    return "\n".join([shown[0], rule, *shown[1:]])


def write_report(directory: Path, run: dict[str, Any], results: Sequence[Result]) -> None:
    """Writes quality.md, quality.json and quality.png.

    Args:
        run: What was measured, how, when and on what.
    """
    machine = run["machine"]
    lines = [
        f"# What compression costs: {run['model']}",
        f"{run['text']['num_tokens']} tokens of a text (SHA-256 {run['text']['sha256'][:16]}), "
        f"window {run['window']}, stride {run['stride']}; reference `{run['reference']}`; "
        f"{run['num_prompts']} prompts continued by {run['continuation']} tokens; speeds over a prompt of "
        f"{run['prefill_tokens']} tokens and the {run['decode_tokens']} after it.",
        f"{run['date']}, {machine['processor']}, {machine['usable_cores']} cores, {machine['kernels']}, "
        f"torch {machine['torch']}.",
        format_table(results),
        DEFINITIONS,
    ]
    (directory / "quality.md").write_text("\n\n".join(lines) + "\n")
    rows = [{name: getattr(result, name) for name in Result.__slots__} for result in results]
    (directory / "quality.json").write_text(json.dumps(run | {"variants": rows}, indent=2) + "\n")
    plot(directory / "quality.png", results)


def check_plotting() -> None:
    """Raises:
    ConfigError: The package that plots is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_package(error, "quality") from error


def plot(path: Path, results: Sequence[Result]) -> None:
    """Two panels: KL divergence by bits per weight and by decode speed, with the front of what nothing beats."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(15, 7), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    divergences = [result.kl_divergence for result in results]
    # What costs nothing or next to it stays in the picture: linear near zero.
    least = min((kl for kl in divergences if kl > 0), default=1.0)
    sizes = [result.bits_per_weight for result in results]
    panels[0].set_xscale("log", base=2)
    panels[0].set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    panels[0].set_yscale("symlog", linthresh=least, linscale=0.5)
    axes = (
        ("bits per weight", sizes, 1),
        ("decode, tokens/s", [result.decode_rate for result in results], -1),
    )
    for panel, (label, values, sign) in zip(panels, axes, strict=True):
        # The front is of what is small; more tokens a second are better.
        front = pareto_front([(sign * value, kl) for value, kl in zip(values, divergences, strict=True)])
        panel.plot(
            [values[index] for index in front],
            [divergences[index] for index in front],
            # Between two of them the best that a limit allows is the one before.
            drawstyle="steps-post",
            color="tab:orange",
            zorder=1,
            label="Pareto front",
        )
        around = [
            [result.kl_divergence - result.spread["kl_divergence"][0] for result in results],
            [result.spread["kl_divergence"][1] - result.kl_divergence for result in results],
        ]
        panel.errorbar(values, divergences, around, fmt="o", color="tab:blue", capsize=3, zorder=2)
        panel.set_xlabel(label)
        panel.margins(0.12)
        panel.grid(alpha=0.3)
        panel.legend(loc="upper right" if sign > 0 else "upper left")
    panels[0].set_ylabel("KL divergence from the reference, nats")
    panels[0].xaxis.set_major_formatter(ScalarFormatter())
    # Places are known once everything else is laid out, and stay.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, (_, values, _) in zip(panels, axes, strict=True):
        _label(panel, list(zip(values, divergences, strict=True)), [result.variant for result in results])
    figure.savefig(path)


def _label(panel: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes names beside points, each at the nearest place where it covers no point and no other name."""
    from matplotlib.transforms import Bbox

    per_point = DPI / 72
    taken = [
        Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in panel.transData.transform(list(points))
    ]
    if legend := panel.get_legend():
        taken.append(legend.get_window_extent())
    for point, name in zip(points, names, strict=True):
        label = panel.annotate(
            name if len(name) <= LABEL_LENGTH else f"…{name[1 - LABEL_LENGTH :]}",
            point,
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.5},
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
            zorder=1.5,
        )
        at_point = label.get_window_extent()
        fitting = (
            (dx, dy, extent)
            for dx, dy in _offsets(at_point.width / per_point, at_point.height / per_point)
            if _lies_within(extent := at_point.translated(dx * per_point, dy * per_point), panel.bbox)
            and not any(extent.overlaps(other) for other in taken)
        )
        dx, dy, extent = next(fitting, (5.0, 5.0, at_point))
        label.set_position((dx, dy))
        taken.append(extent)


def _offsets(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Where the lower left corner of a name may lie around its point, from near to far."""
    for radius in range(6, 150, 8):
        for step in range(16):
            # To the upper right first, then in turn below and above.
            angle = math.pi / 8 * (-1) ** step * (step // 2 + 0.5)
            x, y = radius * math.cos(angle), radius * math.sin(angle)
            yield (x if x >= 0 else x - width), y - height / 2


def _lies_within(inner: BboxBase, outer: BboxBase) -> bool:
    return outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1
