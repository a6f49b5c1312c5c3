"""The sampler: from logits to tokens, row by row, each row by itself alone.

Order of operations: log-probabilities are taken from the model's own logits; then logit_bias, penalties and
banned tokens; then temperature, top_k, min_p, top_p (over what the other two left), and the draw. Filters keep
or drop equal logits together, and among equal maxima the lowest token id wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.core.batch import Draw
from engine.core.random import draw_key
from engine.core.request import RowFailure, SampledToken
from engine.kernels.sample import Adjustments, DrawParameters, adjust_logits, draw, greedy, logprobs_of


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[SampledToken | RowFailure]:
    """Draws one token a row, on the CPU.

    Args:
        logits: [rows, vocabulary] float32.
        draws: How to draw, one a row.

    Returns:
        One entry a row; a row that cannot be sampled does not touch the others.
    """
    plain = [row for row, how in enumerate(draws) if _is_plain(how)]
    results = {
        row: _sample_row(logits[row : row + 1], how) for row, how in enumerate(draws) if not _is_plain(how)
    }
    if plain:
        rows = logits if len(plain) == len(draws) else logits[plain]
        results.update(zip(plain, map(_result, greedy(rows).tolist()), strict=True))
    return [results[row] for row in range(len(draws))]


def _is_plain(how: Draw) -> bool:
    """Whether all that is wanted is the likeliest token."""
    return how.params.is_greedy and how.params.logprobs is None and not _is_adjusted(how)


def _result(token_id: int) -> SampledToken | RowFailure:
    if token_id < 0:
        return RowFailure("no token can be drawn: the logits are not finite (NaN or infinity)")
    return SampledToken(token_id)


def _sample_row(logits: torch.Tensor, how: Draw) -> SampledToken | RowFailure:
    adjustments = adjustments_of([how])
    adjusted = logits
    if adjustments is not None:
        adjusted = logits.clone()
        adjust_logits(adjusted, adjustments)
    token = draw(adjusted, parameters_of([how]), filters=has_filters(how))
    result = _result(int(token))
    if isinstance(result, RowFailure) or how.params.logprobs is None:
        return result
    logprobs = logprobs_of(logits, token, how.params.logprobs)
    return SampledToken(
        result.token_id,
        logprob=float(logprobs.chosen),
        rank=int(logprobs.ranks),
        top_logprobs=list(zip(logprobs.top_ids[0].tolist(), logprobs.top_values[0].tolist(), strict=True)),
    )


def has_filters(how: Draw) -> bool:
    """Whether top_k, top_p or min_p restrict the draw."""
    params = how.params
    return not params.is_greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)


def parameters_of(draws: Sequence[Draw]) -> DrawParameters:
    """The draws as the kernel takes them, on the CPU."""
    keys = [draw_key(how.seed, how.index, how.position) for how in draws]
    params = [how.params for how in draws]
    return DrawParameters(
        key_low=torch.tensor([low for low, _ in keys], dtype=torch.int32),
        key_high=torch.tensor([high for _, high in keys], dtype=torch.int32),
        temperature=torch.tensor(
            [0.0 if p.is_greedy else p.temperature for p in params], dtype=torch.float32
        ),
        # More than any vocabulary is all of it.
        top_k=torch.tensor([min(p.top_k, 2**31 - 1) for p in params], dtype=torch.int32),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32),
    )


def adjustments_of(draws: Sequence[Draw]) -> Adjustments | None:
    """The bias, penalties and bans of the draws' rows, on the CPU; None where there are none."""
    rows = [(row, *_adjustments_of_row(how)) for row, how in enumerate(draws) if _is_adjusted(how)]
    if not rows:
        return None
    numbers, token_ids, bias, repetition, subtract = zip(*rows, strict=True)
    return Adjustments(
        rows=torch.from_numpy(np.repeat(np.array(numbers, np.int32), [len(ids) for ids in token_ids])),
        token_ids=torch.from_numpy(np.concatenate(token_ids).astype(np.int32)),
        bias=torch.from_numpy(np.concatenate(bias)),
        repetition=torch.from_numpy(np.concatenate(repetition)),
        subtract=torch.from_numpy(np.concatenate(subtract)),
    )


def _is_adjusted(how: Draw) -> bool:
    return bool(how.params.logit_bias or how.params.has_penalties or how.stop_token_ids)


def _adjustments_of_row(how: Draw) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(token ids, bias, repetition, subtract), ids ascending and each once."""
    params = how.params
    biased = np.array(list(params.logit_bias), np.int64)
    banned = np.array(how.stop_token_ids, np.int64)
    used, counts = np.unique(np.array(how.output_token_ids, np.int64), return_counts=True)
    seen = (
        np.union1d(used, np.array(how.prompt_token_ids, np.int64))
        if params.repetition_penalty != 1.0
        else used
    )
    token_ids = np.unique(np.concatenate((biased, banned, seen)))
    bias, subtract = np.zeros((2, len(token_ids)), np.float32)
    repetition = np.ones(len(token_ids), np.float32)
    bias[np.searchsorted(token_ids, biased)] = list(params.logit_bias.values())
    bias[np.searchsorted(token_ids, banned)] = -np.inf
    repetition[np.searchsorted(token_ids, seen)] = params.repetition_penalty
    subtract[np.searchsorted(token_ids, used)] = np.float32(params.frequency_penalty) * counts.astype(
        np.float32
    ) + np.float32(params.presence_penalty)
    return token_ids, bias, repetition, subtract
