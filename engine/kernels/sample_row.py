"""What is drawn in a row of logits, written out: the definition that C bodies equal to the bit, and Triton's nearly.

Masses are whole numbers, 2^30 that of the likeliest token, so that their sums know no order. Noise and
log-probabilities are float32 of `float_math`.
"""

from __future__ import annotations

import math

import torch

from engine.kernels import float_math
from engine.kernels.noise import gumbel_noise

MASS_BITS = 30


def masses(logits: torch.Tensor, peak: torch.Tensor, temperature: float) -> torch.Tensor:
    """floor(2^30 exp((logit - peak) / temperature)), int64 of the logits' shape."""
    return (float_math.exp_negative((logits - peak) / temperature) * 2.0**MASS_BITS).long()


def threshold(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> float:
    """The smallest logit of [V] float32 that the filters keep; or less; -inf where there are none.

    Args:
        temperature: More than 0; like `top_p` and `min_p` a float32.
    """
    least = -math.inf
    if 0 < top_k < len(logits):
        least = float(logits.topk(top_k).values[-1])
    if min_p > 0.0:
        # p >= min_p * p_max, in logarithms.
        least = max(least, float(logits.max() + temperature * torch.tensor(float_math.log_of(min_p))))
    if top_p < 1.0:
        kept = logits[logits >= least]
        kept = kept.sort(descending=True).values
        reached = masses(kept, logits.max(), temperature).cumsum(0)
        target = math.ceil(top_p * int(reached[-1]))
        least = float(kept[torch.searchsorted(reached, target)])
    return least


def draw(
    logits: torch.Tensor, key: tuple[int, int], temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    """The token drawn from [V] float32; -1 where one is NaN, or the largest, over the temperature too, not finite.

    The largest of logit / temperature + Gumbel noise among those that the filters keep, at temperature 0 the largest
    logit; of equal ones the lowest token id.
    """
    peak, likeliest = logits.max(dim=0)  # of a row with a NaN that
    if not peak.isfinite():
        return -1
    if temperature == 0.0:
        return int(likeliest)
    if not (peak / temperature).isfinite():
        return -1
    token_ids = (logits >= threshold(logits, temperature, top_k, top_p, min_p)).nonzero().squeeze(1)
    scores = logits[token_ids] / temperature + gumbel_noise(key, token_ids)
    return int(token_ids[scores.argmax()])


def log_probabilities(
    logits: torch.Tensor, token: int, num: int
) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
    """What is said about a token of [V] float32, and about the likeliest ones.

    Returns:
        Its log-probability; its rank from 1, which equals share; ids and log-probabilities of the `num` likeliest, of
        equal ones the lowest ids first.
    """
    log_sum = float_math.log_sum_exp(logits)
    rank = int((logits > logits[token]).sum()) + 1
    values, token_ids = (x[:num] for x in logits.sort(descending=True, stable=True))
    return logits[token] - log_sum, rank, token_ids, values - log_sum
