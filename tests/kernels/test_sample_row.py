"""The C bodies of the sampler against the definition, to the bit; and the definition's own functions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from engine.core.random import draw_key
from engine.kernels import cpu, float_math, sample
from engine.kernels.noise import gumbel_noise, uniform_noise
from engine.kernels.sample import Adjustments, DrawParameters
from tests.helpers.logits import bitmask, random_logits

KINDS = ["normal", "tied", "flat", "masked", "wide", "equal", "low"]
FILTERS = list(itertools.product((0, 1, 40, 3_000), (1.0, 0.95, 0.3, 0.9999), (0.0, 0.05)))


@pytest.fixture
def compiler() -> None:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")


def parameters(
    temperatures: list[float], filters: list[tuple[int, float, float]], seed: int
) -> DrawParameters:
    keys = torch.tensor([draw_key(seed, 0, row) for row in range(len(filters))], dtype=torch.int32)
    top_k, top_p, min_p = zip(*filters, strict=True)
    return DrawParameters(
        key_low=keys[:, 0].contiguous(),
        key_high=keys[:, 1].contiguous(),
        temperature=torch.tensor(temperatures),
        top_k=torch.tensor(top_k, dtype=torch.int32),
        top_p=torch.tensor(top_p),
        min_p=torch.tensor(min_p),
    )


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 5, 33, 700, 49_155])
def test_c_draws_what_is_defined(kind: str, vocab_size: int) -> None:
    rows = FILTERS if vocab_size < 10_000 else FILTERS[::3]
    logits = random_logits(kind, len(rows), vocab_size)
    for seed, temperature in enumerate((0.0, 0.3, 1.0, 2.0)):
        how = parameters([temperature] * len(rows), rows, seed)
        assert torch.equal(sample.draw_tokens(logits, how, filters=True), sample.reference(logits, how))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 33, 1_000, 49_155])
def test_c_has_the_log_probabilities_that_are_defined(kind: str, vocab_size: int) -> None:
    nums = [min(num, vocab_size) for num in (0, 1, 5, 20)]
    logits = random_logits(kind, len(nums), vocab_size)
    tokens = torch.randint(0, vocab_size, (len(nums),), dtype=torch.int32)
    measured, expected = (
        body(logits, tokens, nums) for body in (sample.logprobs_of, sample.reference_logprobs)
    )
    assert torch.equal(measured.chosen, expected.chosen)
    assert torch.equal(measured.ranks, expected.ranks)
    for row, num in enumerate(nums):
        assert torch.equal(measured.top_ids[row, :num], expected.top_ids[row, :num])
        assert torch.equal(measured.top_values[row, :num], expected.top_values[row, :num])


@pytest.mark.usefixtures("compiler")
def test_c_changes_logits_as_is_defined() -> None:
    num_rows, vocab_size = 5, 1_001
    logits = random_logits("normal", num_rows, vocab_size)
    allowed = [torch.randperm(vocab_size)[: 300 * (row + 1)].tolist() for row in range(num_rows)]
    rows = torch.randint(0, num_rows, (900,)).sort().values
    token_ids = torch.cat([torch.randperm(vocab_size + 9)[:count] - 4 for count in rows.bincount().tolist()])
    entries = Adjustments(
        rows=rows.int(),
        token_ids=token_ids.int(),
        bias=torch.where(torch.rand(900) < 0.1, -math.inf, torch.randn(900)),
        repetition=torch.rand(900) * 2 + 0.1,
        subtract=torch.randn(900),
    )
    mask = bitmask(allowed, vocab_size)
    measured, expected = logits.clone(), torch.full_like(logits, -math.inf)
    for row, ids in enumerate(allowed):
        expected[row, ids] = logits[row, ids]
    sample.mask_logits(measured, mask)
    assert torch.equal(measured, expected)
    sample.adjust_logits(measured, entries)
    sample.reference_adjust(expected, entries)
    assert torch.equal(measured, expected)


def test_exp_and_log_are_nearly_the_librarys() -> None:
    x = torch.cat((-torch.rand(200_000) * 87, -torch.logspace(-30, 1, 1_000)))
    assert ((float_math.exp_negative(x).double() / x.double().exp() - 1).abs() < 3e-7).all()
    ends = float_math.exp_negative(torch.tensor([0.0, -87.0, -87.01, -math.inf])).tolist()
    assert ends == [1.0, pytest.approx(math.exp(-87.0), rel=3e-7), 0.0, 0.0]
    x = torch.cat(
        (torch.rand(100_000) + 1e-30, torch.logspace(-37, 37, 10_000), 1 - torch.logspace(-7, -1, 100))
    )
    wanted = x.double().log()
    assert ((float_math.log(x).double() - wanted).abs() <= 3e-7 * wanted.abs()).all()
    assert float_math.log(torch.ones(1)).item() == 0.0


def test_noise_keeps_the_digits_of_a_small_u() -> None:
    token_ids = torch.arange(500_000)
    u = uniform_noise((5, 7), token_ids).double()
    wanted = -torch.log(-torch.log1p(-u))
    assert ((gumbel_noise((5, 7), token_ids) - wanted).abs() < 1e-6).all()


def test_a_vocabulary_smaller_than_what_is_asked_for_is_listed_whole() -> None:
    logits, tokens = torch.tensor([[0.5, 2.0, 2.0]]), torch.tensor([0], dtype=torch.int32)
    for body in (sample.logprobs_of, sample.reference_logprobs):
        found = body(logits, tokens, [20])
        assert found.top_ids.tolist() == [[1, 2, 0]]
        assert found.top_values.shape == (1, 3)
