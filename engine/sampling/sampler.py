"""The sampler: from logits to tokens, row by row, each row by itself alone.

Order of operations: log-probabilities are taken from the model's own logits; then logit_bias, penalties and
banned tokens; then temperature, min_p, top_k, top_p (over what top_k left), and the draw.
"""

from __future__ import annotations

import torch

from engine.batch import Draw
from engine.request import RowFailure, SampledToken
from engine.sampling.params import SamplingParams
from engine.sampling.random import draw_key, gumbel_noise


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[SampledToken | RowFailure]:
    """Draws one token a row.

    Args:
        logits: [rows, vocabulary] float32.
        draws: How to draw, one a row.

    Returns:
        One entry a row; a row that cannot be sampled does not touch the others.
    """
    largest, likeliest = logits.max(dim=-1)
    valid = largest.isfinite().tolist()
    results: list[SampledToken | RowFailure] = []
    for row, (draw, token_id) in enumerate(zip(draws, likeliest.tolist(), strict=True)):
        if not valid[row]:
            results.append(RowFailure("the model's logits are not finite (NaN or infinity)"))
            continue
        try:
            if not _is_plain_greedy(draw):
                token_id = _draw_token(logits[row].clone(), draw)
            results.append(_with_logprobs(logits[row], token_id, draw.params.logprobs))
        except (IndexError, RuntimeError, ValueError) as error:
            results.append(RowFailure(f"sampling failed: {error}"))
    return results


def _is_plain_greedy(draw: Draw) -> bool:
    params = draw.params
    return params.is_greedy and not (params.logit_bias or params.has_penalties or draw.stop_token_ids)


def _draw_token(logits: torch.Tensor, draw: Draw) -> int:
    """Draws from one row; `logits` [vocabulary] is overwritten."""
    params = draw.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if params.has_penalties:
        _penalize(logits, draw)
    if draw.stop_token_ids:
        logits[list(draw.stop_token_ids)] = -torch.inf
    if params.is_greedy:
        return int(logits.argmax())
    logits /= params.temperature
    token_ids = _candidates(logits, params)
    noise = gumbel_noise(draw_key(draw.seed, draw.index, draw.position), token_ids)
    return int(token_ids[(logits[token_ids] + noise).argmax()])


def _penalize(logits: torch.Tensor, draw: Draw) -> None:
    params, device = draw.params, logits.device
    output = torch.tensor(draw.output_token_ids, dtype=torch.int64, device=device)
    if params.repetition_penalty != 1.0:
        prompt = torch.tensor(draw.prompt_token_ids, dtype=torch.int64, device=device)
        seen = torch.unique(torch.cat((prompt, output)))
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    used, counts = torch.unique(output, return_counts=True)
    logits[used] -= params.frequency_penalty * counts + params.presence_penalty


def _candidates(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Ids of the tokens that min_p, top_k and top_p leave, [candidates] int64."""
    num_tokens = logits.shape[0]
    if params.top_k and params.top_k < num_tokens:
        values, token_ids = logits.topk(params.top_k)
    else:
        values, token_ids = logits, torch.arange(num_tokens, device=logits.device)
    if params.min_p > 0.0:
        # p >= min_p * p_max, in logarithms.
        keep = values >= values.max() + torch.log(torch.tensor(params.min_p))
        values, token_ids = values[keep], token_ids[keep]
    if params.top_p < 1.0:
        probabilities = torch.softmax(values, dim=-1)
        # Tokens below (1 - top_p) / n together weigh less than 1 - top_p: none of them is in the nucleus,
        # so only the others need sorting.
        keep = probabilities >= (1.0 - params.top_p) / probabilities.shape[0]
        probabilities, order = probabilities[keep].sort(descending=True, stable=True)
        token_ids = token_ids[keep][order]
        before = probabilities.cumsum(dim=-1) - probabilities
        token_ids = token_ids[before < params.top_p]
    return token_ids


def _with_logprobs(logits: torch.Tensor, token_id: int, num_logprobs: int | None) -> SampledToken:
    if num_logprobs is None:
        return SampledToken(token_id)
    logprobs = torch.log_softmax(logits, dim=-1)
    values, token_ids = logprobs.topk(num_logprobs)
    return SampledToken(
        token_id,
        logprob=float(logprobs[token_id]),
        rank=int((logprobs > logprobs[token_id]).sum()) + 1,
        top_logprobs=list(zip(token_ids.tolist(), values.tolist(), strict=True)),
    )
