"""What comes of a comparison: a table in Markdown, JSON, and plots of quality against size and speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import format_bytes
from engine.errors import ConfigError
from engine.quality.metrics import pareto_front

DEFINITIONS = """\
- bits/weight: bits of all that is stored for the weights, embeddings and scales included, by the number of weights
- perplexity: exp of the mean of -log p(token), each token after the first scored once in a sliding window
- KL: mean KL(reference || variant) of the next-token distributions, in nats
- top-1: share of tokens before which both hold the same token the likeliest
- same tokens: greedy tokens in common with the reference before the first that differs, median over the prompts
- memory: most that the process held while it generated, pages of the mapped weights file included; loading is not
- decode, prefill: tokens/s of one sequence, the decode right after the prefill; median of the runs"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A row of the table; fields as in `engine.quality.measure.Measurement`.

    Attributes:
        first_divergence: Median over the prompts, of the reference's tokens.
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


COLUMNS: dict[str, Callable[[Result], str]] = {
    "variant": lambda result: f"`{result.variant}`",
    "bits/weight": lambda result: f"{result.bits_per_weight:.2f}",
    "perplexity": lambda result: f"{result.perplexity:.3f}",
    "KL": lambda result: f"{result.kl_divergence:.5f}",
    "top-1": lambda result: f"{result.agreement:.2%}",
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
        raise ConfigError("matplotlib is not installed: pip install 'llm-engine[quality]'") from error


def plot(path: Path, results: Sequence[Result]) -> None:
    """Two panels: KL divergence by bits per weight and by decode speed, with the front of what nothing beats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    size_panel, speed_panel = figure.subplots(1, 2, sharey=True)
    panels = (
        (size_panel, "bits per weight", [result.bits_per_weight for result in results], 1),
        (speed_panel, "decode, tokens/s", [result.decode_rate for result in results], -1),
    )
    divergences = [result.kl_divergence for result in results]
    for panel, label, values, sign in panels:
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
        panel.scatter(values, divergences, zorder=2)
        for result, value in zip(results, values, strict=True):
            panel.annotate(
                result.variant,
                (value, result.kl_divergence),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                rotation=25,  # neighbours' labels stay apart
            )
        panel.set_xlabel(label)
        panel.margins(0.15)
        panel.grid(alpha=0.3)
        panel.legend()
    size_panel.set_ylabel("KL divergence from the reference, nats")
    figure.savefig(path, dpi=150)
