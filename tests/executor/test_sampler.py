"""The sampler against probabilities computed the long way, and its independence of the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.batch import Draw
from engine.core.random import derive_seed, draw_key
from engine.core.request import RowFailure, SampledToken
from engine.core.sampling_params import SamplingParams
from engine.executor.adjustments import AdjustmentTable
from engine.executor.sampler import DRAW_WORDS, SamplerInputs, parameters_of, sample
from engine.kernels import sample as kernels
from engine.kernels.noise import gumbel_noise
from tests.helpers.logits import bitmask

VOCABULARY = 50


def make_draw(seed: int = 0, position: int = 0, index: int = 0, **params: object) -> Draw:
    extra = {key: params.pop(key) for key in list(params) if key in Draw.__dataclass_fields__}
    return Draw(SamplingParams(**params), seed, index, position, **extra)  # type: ignore[arg-type]


def sample_rows(
    logits: torch.Tensor, draws: list[Draw], allowed_tokens: torch.Tensor | None = None
) -> list[SampledToken | RowFailure | None]:
    """The rows drawn in one call, which may change logits in place."""
    slots = torch.arange(len(draws), dtype=torch.int32)
    last_tokens = torch.zeros_like(slots)
    changes = AdjustmentTable()
    inputs = SamplerInputs(parameters_of(draws), slots, last_tokens, changes, range(len(draws)))
    if allowed_tokens is not None:
        masks = [mask.tobytes() for mask in allowed_tokens.numpy()]
        draws = [replace(draw, allowed_tokens=mask) for draw, mask in zip(draws, masks, strict=True)]
    results = sample(logits.clone(), draws, inputs).read()
    assert last_tokens.tolist() == [getattr(result, "token_id", 0) for result in results]
    return results


def sample_one(logits: torch.Tensor, draw: Draw) -> int:
    (result,) = sample_rows(logits[None], [draw])
    assert isinstance(result, SampledToken)
    return result.token_id


def frequencies(logits: torch.Tensor, num_draws: int = 4000, **params: object) -> torch.Tensor:
    counts = torch.zeros(len(logits))
    draws = [make_draw(position=i, **dict(params)) for i in range(num_draws)]
    for result in sample_rows(logits.expand(num_draws, -1), draws):
        assert isinstance(result, SampledToken)
        counts[result.token_id] += 1
    return counts / num_draws


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2


def test_greedy_takes_the_largest(logits: torch.Tensor) -> None:
    assert sample_one(logits, make_draw(temperature=0)) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_vanishing_temperature_is_greedy(logits: torch.Tensor, temperature: float) -> None:
    assert sample_one(logits, make_draw(temperature=temperature, top_p=0.9)) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(logits: torch.Tensor, temperature: float) -> None:
    expected = torch.softmax(logits / temperature, dim=-1)
    measured = frequencies(logits, temperature=temperature)
    # Five standard deviations of a binomial share of 4000 draws.
    assert torch.all((measured - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-3)


def kept_by_definition(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """min_p, top_k and top_p as their papers define them, over a fully sorted list; equal logits stay together."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    order = probabilities.argsort(descending=True).tolist()
    order = [i for i in order if probabilities[i] >= min_p * probabilities.max()]
    if top_k:
        order = [i for i in order if probabilities[i] >= probabilities[order[min(top_k, len(order)) - 1]]]
    total = sum(float(probabilities[i]) for i in order)
    nucleus, mass = [], 0.0
    for i in order:
        if mass >= top_p and top_p < 1.0:
            break
        nucleus.append(i)
        mass += float(probabilities[i]) / total
    return {i for i in order if probabilities[i] >= probabilities[nucleus[-1]]}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.1), (5, 0.7, 0.0), (8, 0.9, 0.05), (0, 0.05, 0.0)],
)
def test_filters_keep_what_their_definitions_keep(
    logits: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> None:
    measured = frequencies(logits, 3000, top_k=top_k, top_p=top_p, min_p=min_p, temperature=2.0)
    kept = kept_by_definition(logits / 2.0, top_k, top_p, min_p)
    assert set(measured.nonzero().flatten().tolist()) <= kept
    likely = {i for i in kept if torch.softmax(logits / 2.0, -1)[i] > 0.01}
    assert likely <= set(measured.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(4, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (12, 0.7, 0.0), (30, 0.8, 0.1)]
)
def test_filters_keep_equal_logits_together(
    logits: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> None:
    coarse = logits.round()
    measured = frequencies(coarse, 3000, top_k=top_k, top_p=top_p, min_p=min_p, temperature=2.0)
    drawn = set(measured.nonzero().flatten().tolist())
    kept = kept_by_definition(coarse / 2.0, top_k, top_p, min_p)
    assert drawn == kept
    assert len(kept) > len(set(coarse[sorted(kept)].tolist()))


def test_among_equals_the_lowest_token_id_wins() -> None:
    """At 1e30 the noise is lost in rounding, and a draw is a choice among equals too."""
    logits = torch.zeros(100_003)
    logits[[70_001, 9, 42, 100_002]] = 1e30
    assert sample_one(logits, make_draw(temperature=0)) == 9
    for seed in range(5):
        assert sample_one(logits, make_draw(seed)) == 9
        assert sample_one(logits, make_draw(seed, top_k=2, top_p=0.5)) == 9


@settings(max_examples=30, deadline=None)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=6),
)
def test_a_draw_does_not_depend_on_the_batch(seeds: list[int]) -> None:
    logits = torch.randn(len(seeds), VOCABULARY, generator=torch.Generator().manual_seed(len(seeds)))
    draws = [
        make_draw(seed, position=i, temperature=0.9, top_p=0.9, top_k=20) for i, seed in enumerate(seeds)
    ]
    together = sample_rows(logits, draws)
    alone = [sample_rows(logits[i : i + 1], [draws[i]])[0] for i in range(len(seeds))]
    assert together == alone


KINDS: list[dict[str, object]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "frequency_penalty": 0.5, "output_token_ids": (3, 3, 40_000)},
    {},
    {"temperature": 0.7, "logprobs": 20},
    {"temperature": 1.3, "top_k": 40, "logprobs": 0},
    {"temperature": 0.9, "top_p": 0.9, "logprobs": 5},
    {"temperature": 2.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 300, "top_p": 0.95, "min_p": 0.01, "logit_bias": {5: 8.0}, "logprobs": 3},
    {"repetition_penalty": 1.3, "prompt_token_ids": (1, 2, 3), "output_token_ids": (9, 9), "logprobs": 1},
    {"presence_penalty": 1.5, "output_token_ids": (8,), "banned_token_ids": (2,), "top_p": 0.5},
]


def drawn_alone(logits: torch.Tensor, draw: Draw) -> SampledToken | RowFailure:
    """The row, [1, vocabulary], by the references of the kernels one after the other."""
    adjusted, adjustments = logits.clone(), AdjustmentTable().update([draw], [0])
    if adjustments is not None:
        kernels.reference_adjust(adjusted, adjustments)
    token = kernels.reference(adjusted, parameters_of([draw]))
    if int(token) < 0:
        return RowFailure("no token can be drawn: the logits are not finite (NaN or infinity)")
    if draw.params.logprobs is None:
        return SampledToken(int(token))
    found = kernels.reference_logprobs(logits, token, [draw.params.logprobs])
    top = zip(found.top_ids[0].tolist(), found.top_values[0].tolist(), strict=True)
    return SampledToken(int(token), float(found.chosen), int(found.ranks), list(top))


@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_one_call_draws_in_each_row_what_the_row_alone_does(kind: str) -> None:
    """To the bit, log-probabilities and the order of equals too, on one thread and on three."""
    draws = [make_draw(seed, position=seed, **dict(params)) for seed, params in enumerate(KINDS * 2)]
    logits = torch.randn(len(draws), 49_152, generator=torch.Generator().manual_seed(5)) * 3
    if kind == "tied":
        logits = logits.round()
    logits[4, 77], logits[6, 0], logits[12] = math.nan, math.inf, -math.inf
    num_threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            expected = [drawn_alone(logits[row : row + 1], draw) for row, draw in enumerate(draws)]
            assert sample_rows(logits, draws) == expected
            for rows in (slice(0, 1), slice(3, 9), slice(8, None)):
                assert sample_rows(logits[rows], draws[rows]) == expected[rows]
    finally:
        torch.set_num_threads(num_threads)
    assert sum(isinstance(result, RowFailure) for result in expected) == 3


def test_only_allowed_tokens_are_drawn(logits: torch.Tensor) -> None:
    allowed = [[0, 31, 32, 49], [int(logits.argmin())], list(range(VOCABULARY))] * 200
    params = [{"temperature": 2.0}, {"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}] * 200
    draws = [make_draw(seed, logit_bias={7: 100.0}, **dict(kind)) for seed, kind in enumerate(params)]
    results = sample_rows(logits.expand(len(draws), -1), draws, bitmask(allowed, VOCABULARY))
    tokens = [result.token_id for result in results if isinstance(result, SampledToken)]
    assert set(tokens[0::3]) == {0, 31, 32, 49}
    assert set(tokens[1::3]) == {int(logits.argmin())}
    assert set(tokens[2::3]) == {7}


def test_a_bitmask_that_allows_everything_changes_no_bit(logits: torch.Tensor) -> None:
    draws = [make_draw(seed, position=seed, **dict(params)) for seed, params in enumerate(KINDS)]
    rows = torch.randn(len(draws), 40_001)
    everything = bitmask([list(range(40_001))] * len(draws), 40_001)
    assert sample_rows(rows, draws, everything) == sample_rows(rows, draws)


def test_log_probabilities_do_not_know_of_the_bitmask(logits: torch.Tensor) -> None:
    draws = [make_draw(temperature=0, logprobs=4)]
    (result,) = sample_rows(logits[None], draws, bitmask([[11]], VOCABULARY))
    (free,) = sample_rows(logits[None], draws)
    assert isinstance(result, SampledToken)
    assert isinstance(free, SampledToken)
    assert result.token_id == 11
    assert result.top_logprobs == free.top_logprobs
    assert result.logprob == pytest.approx(float(torch.log_softmax(logits, 0)[11]), abs=1e-5)


def test_rows_that_draw_nothing_keep_their_places(logits: torch.Tensor) -> None:
    greedy, biased = (
        make_draw(temperature=0, logprobs=0),
        make_draw(temperature=0, logit_bias={7: 100.0}, logprobs=1),
    )
    last_tokens = torch.full((6,), 99, dtype=torch.int32)
    inputs = SamplerInputs(
        parameters_of([greedy, biased]),
        torch.tensor([4, 1], dtype=torch.int32),
        last_tokens,
        AdjustmentTable(),
        [4, 1],
    )
    results = sample(logits.expand(2, -1).clone(), [None, greedy, None, biased], inputs).read()
    assert results[0] is results[2] is None
    assert results[1::2] == sample_rows(logits.expand(2, -1), [greedy, biased])
    assert last_tokens.tolist() == [99, 7, 99, 99, int(logits.argmax()), 99]


def test_samples_positions_and_seeds_draw_differently(logits: torch.Tensor) -> None:
    flat = torch.zeros(10_000)
    tokens = {
        sample_one(flat, make_draw(seed, position, index))
        for seed, position, index in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]
    }
    assert len(tokens) == 5
    assert sample_one(flat, make_draw(5, 3, 1)) == sample_one(flat, make_draw(5, 3, 1))


def test_logit_bias_and_banned_tokens(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    assert sample_one(logits, make_draw(temperature=0, logit_bias={7: 100.0})) == 7
    assert sample_one(logits, make_draw(temperature=0, banned_token_ids=(best,))) != best
    assert sample_one(logits, make_draw(temperature=1.0, logit_bias={7: 100.0}, banned_token_ids=(7,))) != 7


def test_penalties_are_the_published_formulas() -> None:
    logits = torch.tensor([2.0, -1.0, 3.0, 0.5])
    penalized = make_draw(
        temperature=0,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        prompt_token_ids=(0, 1),
        output_token_ids=(2, 2),
        logprobs=0,
    )
    # Repetition: 2/2, -1*2, 3/2; then presence and frequency of token 2: 1.5 - 0.25 - 2 * 0.5 = 0.25.
    assert sample_one(logits, penalized) == 0
    # 3 - 0.25 - 2 * 0.5 = 1.75 loses to 2; 3 - 0.5 does not.
    twice = make_draw(temperature=0, frequency_penalty=0.5, presence_penalty=0.25, output_token_ids=(2, 2))
    assert sample_one(logits, twice) == 0
    once = make_draw(temperature=0, frequency_penalty=0.5, output_token_ids=(2,))
    assert sample_one(logits, once) == 2


def test_logprobs_are_of_the_models_own_distribution(logits: torch.Tensor) -> None:
    (result,) = sample_rows(logits[None], [make_draw(temperature=0, logit_bias={7: 100.0}, logprobs=3)])
    assert isinstance(result, SampledToken)
    expected = torch.log_softmax(logits.double(), dim=-1)
    order = expected.argsort(descending=True).tolist()
    assert result.token_id == 7
    assert result.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert result.rank == order.index(7) + 1
    assert [token for token, _ in result.top_logprobs] == order[:3]
    assert [value for _, value in result.top_logprobs] == pytest.approx(
        expected[order[:3]].tolist(), abs=1e-5
    )


def test_a_row_that_is_not_finite_fails_alone(logits: torch.Tensor) -> None:
    rows = logits.expand(3, -1).clone()
    rows[1, 4] = math.nan
    first, broken, last = sample_rows(rows, [make_draw(temperature=0)] * 3)
    assert isinstance(broken, RowFailure)
    assert "finite" in broken.message
    assert first == last == SampledToken(int(logits.argmax()))


def test_a_row_without_a_token_left_to_draw_fails() -> None:
    (result,) = sample_rows(torch.zeros(1, 3), [make_draw(temperature=0, banned_token_ids=(0, 1, 2))])
    assert isinstance(result, RowFailure)


def test_gumbel_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel_noise(draw_key(3, 0, 17), torch.arange(200_000))
    assert noise.isfinite().all()
    # Mean: Euler's constant. Variance: pi² / 6. Five standard errors.
    assert float(noise.mean()) == pytest.approx(0.57722, abs=5 * 1.2825 / 200_000**0.5)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    quantile = -math.log(-math.log(0.999))
    assert float((noise > quantile).float().mean()) == pytest.approx(0.001, abs=0.0004)


def test_noise_of_a_token_is_the_same_in_any_selection() -> None:
    key = draw_key(-12, 3, 4096)
    every = gumbel_noise(key, torch.arange(1000))
    some = torch.tensor([999, 0, 500])
    assert torch.equal(gumbel_noise(key, some), every[some])


def test_the_generator_is_fixed() -> None:
    """Golden values: a stream recorded today is the same after an upgrade."""
    assert draw_key(0, 0, 0) == (956087953, 595752380)
    assert derive_seed(0, 1) == 313702574736366215
    noise = gumbel_noise(draw_key(42, 1, 7), torch.tensor([0, 1, 2, 49151]))
    assert noise.tolist() == pytest.approx([-0.52319163, 0.57648152, 0.44929618, 3.22080207], abs=1e-5)


def test_parameters_that_are_integers_are_drawn_as_floats() -> None:
    parameters = parameters_of([Draw(SamplingParams(temperature=1, top_p=1, min_p=0), 0, 0, 0)])
    assert {parameters.temperature.dtype, parameters.top_p.dtype, parameters.min_p.dtype} == {torch.float32}


def test_every_word_of_a_draw_has_a_type() -> None:
    assert set(DRAW_WORDS) == set(kernels.DrawParameters.__slots__)
    found = parameters_of([make_draw(top_k=2**40)])
    assert {name: getattr(found, name).dtype for name in DRAW_WORDS} == DRAW_WORDS
    assert found.top_k.tolist() == [2**31 - 1]
