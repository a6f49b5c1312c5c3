"""Checks of the sampler: adjustments, filters, the draw and log-probabilities against the CPU's bodies."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.steps import Step, Values, equal, within
from engine.core.random import draw_key
from engine.kernels import sample
from engine.kernels.noise import gumbel_noise
from engine.kernels.sample import Adjustments, DrawParameters
from engine.kernels.sample_triton import find_thresholds

FILTERS = [
    (1, 1.0, 0.0),
    (20, 1.0, 0.0),
    (700, 1.0, 0.0),
    (0, 0.05, 0.0),
    (0, 0.9, 0.0),
    (0, 0.999, 0.0),
    (0, 1.0, 0.05),
    (50, 0.8, 0.0),
    (300, 0.95, 0.02),
    (0, 1.0, 0.0),
]
"""(top_k, top_p, min_p)."""


def draw_parameters(
    num_rows: int, device: torch.device, temperature: float, filters: list[tuple[int, float, float]]
) -> DrawParameters:
    """Parameters for rows that take the filters in turns."""
    keys = torch.tensor([draw_key(7, 0, row) for row in range(num_rows)], dtype=torch.int32)
    top_k, top_p, min_p = zip(*(filters[row % len(filters)] for row in range(num_rows)), strict=True)
    return DrawParameters(
        key_low=keys[:, 0].contiguous().to(device),
        key_high=keys[:, 1].contiguous().to(device),
        temperature=torch.full((num_rows,), temperature, device=device),
        top_k=torch.tensor(top_k, dtype=torch.int32).to(device),
        top_p=torch.tensor(top_p, dtype=torch.float32).to(device),
        min_p=torch.tensor(min_p, dtype=torch.float32).to(device),
    )


def _on_cpu(how: DrawParameters) -> DrawParameters:
    return DrawParameters(*(getattr(how, name).cpu() for name in DrawParameters.__slots__))


def _logits(kind: str, num_rows: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size, device=device) * 3
    return {"normal": logits, "tied": logits.mul(4).round() / 4, "flat": logits / 30}[kind]


def _adjust(vocab_size: int, device: torch.device) -> Values:
    logits = _logits("normal", 5, vocab_size, device)
    count = min(300, vocab_size)
    rows = torch.arange(5, dtype=torch.int32).repeat_interleave(count)
    token_ids = torch.cat([torch.randperm(vocab_size)[:count] for _ in range(5)]).to(torch.int32)
    numbers = torch.rand(3, len(rows))
    numbers[0, ::7] = -torch.inf
    entries = Adjustments(rows, token_ids, numbers[0], 0.5 + numbers[1], numbers[2])
    expected = logits.cpu()
    sample.reference_adjust(expected, entries)
    names = Adjustments.__slots__
    sample.adjust_logits(logits, Adjustments(*(getattr(entries, name).to(device) for name in names)))
    equal(logits, expected, "adjusted logits")
    return {}


def _filters(kind: str, vocab_size: int, device: torch.device) -> Values:
    """The same tokens are kept, but for those whose logits a rounding of the threshold or the mass may move."""
    logits = _logits(kind, 2 * len(FILTERS), vocab_size, device)
    how = draw_parameters(len(logits), device, 0.8, FILTERS)
    measured = find_thresholds(logits, how)
    expected = sample.reference_thresholds(logits.cpu(), _on_cpu(how)).to(device)
    kept, wanted = ((logits >= bound[:, None]).sum(dim=1) for bound in (measured, expected))
    is_exact = how.top_p >= 1.0
    assert torch.equal(kept[is_exact], wanted[is_exact]), f"kept {kept.tolist()}, not {wanted.tolist()}"
    # top_p sums a vocabulary of masses in float32: in another order, a few of the least likely may change sides.
    slack = wanted if kind == "tied" else 1 + 0.002 * wanted
    assert ((kept - wanted).abs() <= slack).all(), f"kept {kept.tolist()}, not {wanted.tolist()}"
    return {}


def _draw(kind: str, num_rows: int, vocab_size: int, device: torch.device) -> Values:
    """The reference's tokens, or ones whose score is as good but for rounding."""
    logits = _logits(kind, num_rows, vocab_size, device)
    for temperature in (0.0, 0.7, 1.5):
        how = draw_parameters(len(logits), device, temperature, [(0, 1.0, 0.0), (40, 1.0, 0.0)])
        drawn, host, rows = sample.draw_tokens(logits, how, filters=True).cpu(), _on_cpu(how), logits.cpu()
        expected = sample.reference(rows, host)
        if temperature == 0.0:
            equal(drawn, expected, "greedy tokens")
        for row in (drawn != expected).nonzero()[:, 0].tolist():
            key = int(host.key_low[row]), int(host.key_high[row])
            ids = torch.stack((drawn[row], expected[row])).long()
            scores = rows[row, ids] / temperature + gumbel_noise(key, ids)
            difference = float((scores[0] - scores[1]).abs())
            assert difference < 1e-4, f"row {row}: a token that is behind by {difference:.3g}"
        alone = DrawParameters(*(getattr(how, name)[5:6].clone() for name in DrawParameters.__slots__))
        equal(sample.draw_tokens(logits[5:6].clone(), alone, filters=True).cpu(), drawn[5:6], "a row alone")
    logits[1, 3] = torch.nan
    logits[2, 5] = torch.inf
    broken = sample.draw_tokens(logits, how, filters=True)[:4].tolist()
    assert broken[1] == broken[2] == -1, f"rows with NaN and infinity drew {broken[1:3]}"
    assert broken[0] >= 0, "the row beside a NaN drew nothing"
    return {}


def _logprobs(vocab_size: int, device: torch.device) -> Values:
    logits = _logits("normal", 9, vocab_size, device)
    drawn = torch.randint(0, vocab_size, (9,), device=device, dtype=torch.int32)
    actual = sample.logprobs_of(logits, drawn, [5] * 9)
    expected = logits.double().log_softmax(dim=1)
    chosen = expected.gather(1, drawn.long()[:, None])
    equal(actual.ranks, ((expected > chosen).sum(dim=1) + 1).to(torch.int32), "ranks")
    errors = [
        within(actual.chosen, chosen[:, 0], 1e-4),
        within(actual.top_values, expected.topk(5).values, 1e-4),
    ]
    return {"error": max(error["error"] for error in errors)}


def sampling_steps(
    device: torch.device, vocab_sizes: tuple[int, ...] = (128256, 1000), num_rows: int = 64
) -> list[Step]:
    """Every kernel of the sampler; draws of `num_rows` rows, at least 6."""
    steps = []
    for size in vocab_sizes:
        steps += [
            Step("sample", f"adjust {size}", partial(_adjust, size, device)),
            Step("sample", f"log-probabilities {size}", partial(_logprobs, size, device)),
        ]
        for kind in ("normal", "tied", "flat"):
            steps.append(Step("sample", f"filters {kind} {size}", partial(_filters, kind, size, device)))
            steps.append(Step("sample", f"draw {kind} {size}", partial(_draw, kind, num_rows, size, device)))
    return steps
