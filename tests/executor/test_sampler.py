"""The sampler against probabilities computed the long way, and its independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.batch import Draw
from engine.core.random import derive_seed, draw_key
from engine.core.request import RowFailure, SampledToken
from engine.core.sampling_params import SamplingParams
from engine.executor.sampler import parameters_of, sample
from engine.kernels.noise import gumbel_noise

VOCABULARY = 50


def draw(seed: int = 0, position: int = 0, index: int = 0, **params: object) -> Draw:
    extra = {key: params.pop(key) for key in list(params) if key in Draw.__dataclass_fields__}
    return Draw(SamplingParams(**params), seed, index, position, **extra)  # type: ignore[arg-type]


def sample_one(logits: torch.Tensor, how: Draw) -> int:
    (result,) = sample(logits[None].clone(), [how])
    assert isinstance(result, SampledToken)
    return result.token_id


def frequencies(logits: torch.Tensor, num_draws: int = 4000, **params: object) -> torch.Tensor:
    counts = torch.zeros(len(logits))
    draws = [draw(position=i, **dict(params)) for i in range(num_draws)]
    for result in sample(logits.expand(num_draws, -1).clone(), draws):
        assert isinstance(result, SampledToken)
        counts[result.token_id] += 1
    return counts / num_draws


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2


def test_greedy_takes_the_largest(logits: torch.Tensor) -> None:
    assert sample_one(logits, draw(temperature=0)) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_vanishing_temperature_is_greedy(logits: torch.Tensor, temperature: float) -> None:
    assert sample_one(logits, draw(temperature=temperature, top_p=0.9)) == int(logits.argmax())


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
    assert sample_one(logits, draw(temperature=0)) == 9
    for seed in range(5):
        assert sample_one(logits, draw(seed)) == 9
        assert sample_one(logits, draw(seed, top_k=2, top_p=0.5)) == 9


@settings(max_examples=30, deadline=None)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=6),
)
def test_a_draw_does_not_depend_on_the_batch(seeds: list[int]) -> None:
    logits = torch.randn(len(seeds), VOCABULARY, generator=torch.Generator().manual_seed(len(seeds)))
    draws = [draw(seed, position=i, temperature=0.9, top_p=0.9, top_k=20) for i, seed in enumerate(seeds)]
    together = sample(logits.clone(), draws)
    alone = [sample(logits[i : i + 1].clone(), [draws[i]])[0] for i in range(len(seeds))]
    assert together == alone


def test_samples_positions_and_seeds_draw_differently(logits: torch.Tensor) -> None:
    flat = torch.zeros(10_000)
    tokens = {
        sample_one(flat, draw(seed, position, index))
        for seed, position, index in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]
    }
    assert len(tokens) == 5
    assert sample_one(flat, draw(5, 3, 1)) == sample_one(flat, draw(5, 3, 1))


def test_logit_bias_and_banned_tokens(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    assert sample_one(logits, draw(temperature=0, logit_bias={7: 100.0})) == 7
    assert sample_one(logits, draw(temperature=0, stop_token_ids=(best,))) != best
    assert sample_one(logits, draw(temperature=1.0, logit_bias={7: 100.0}, stop_token_ids=(7,))) != 7


def test_penalties_are_the_published_formulas() -> None:
    logits = torch.tensor([2.0, -1.0, 3.0, 0.5])
    how = draw(
        temperature=0,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        prompt_token_ids=(0, 1),
        output_token_ids=(2, 2),
        logprobs=0,
    )
    # Repetition: 2/2, -1*2, 3/2; then presence and frequency of token 2: 1.5 - 0.25 - 2 * 0.5 = 0.25.
    assert sample_one(logits, how) == 0
    # 3 - 0.25 - 2 * 0.5 = 1.75 loses to 2; 3 - 0.5 does not.
    twice = draw(temperature=0, frequency_penalty=0.5, presence_penalty=0.25, output_token_ids=(2, 2))
    assert sample_one(logits, twice) == 0
    once = draw(temperature=0, frequency_penalty=0.5, output_token_ids=(2,))
    assert sample_one(logits, once) == 2


def test_logprobs_are_of_the_models_own_distribution(logits: torch.Tensor) -> None:
    (result,) = sample(logits[None].clone(), [draw(temperature=0, logit_bias={7: 100.0}, logprobs=3)])
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
    first, broken, last = sample(rows, [draw(temperature=0)] * 3)
    assert isinstance(broken, RowFailure)
    assert "finite" in broken.message
    assert first == last == SampledToken(int(logits.argmax()))


def test_a_row_without_a_token_left_to_draw_fails() -> None:
    (result,) = sample(torch.zeros(1, 3), [draw(temperature=0, stop_token_ids=(0, 1, 2))])
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
