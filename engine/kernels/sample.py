"""Drawing the next token: from logits to tokens without a sort and without a copy to the host.

Row by row, and each row by itself alone:

1. `mask_logits`: bans the tokens that a row's bitmask leaves out;
2. `adjust_logits`: bias, penalties and bans, one entry for each token that they touch;
3. `draw_tokens`, filters, each of which keeps the tokens whose logit reaches a threshold, equal ones alike:
   top_k: the k-th largest logit; min_p: the largest + temperature * log(min_p); top_p: the smallest logit of
   the smallest nucleus (Holtzman et al. 2020) of what the other two have left;
   and the draw: the largest of logit / temperature + Gumbel noise (`engine.kernels.noise`), the lowest token id
   among equals; at temperature 0 the largest logit, likewise;
4. `logprobs_of`: log-probabilities of what was drawn, and of the likeliest tokens.

sample_row.py defines it all; the bodies for CPUs (kernels/cpu/sample.c) equal that to the bit, those in Triton
(sample_triton.py) nearly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.kernels import cpu, sample_row
from engine.kernels.cpu.signatures import Argument
from engine.kernels.launch import Tile, target_of


@dataclass(frozen=True, slots=True)
class Adjustments:
    """What changes logits before the draw, at most one entry for a row's token; all [entries].

    v = logit + bias; then v / repetition where v > 0, else v * repetition; then - subtract.

    Attributes:
        rows, token_ids: int32; rows ascend. What is outside the vocabulary touches nothing.
        bias: float32; -inf bans the token.
        repetition, subtract: float32; 1 and 0 change nothing.
    """

    rows: torch.Tensor
    token_ids: torch.Tensor
    bias: torch.Tensor
    repetition: torch.Tensor
    subtract: torch.Tensor


@dataclass(frozen=True, slots=True)
class DrawParameters:
    """How to draw, for each row; all [R].

    But for the keys, each is the sampling parameter of its name, as int32 or float32.

    Attributes:
        key_low, key_high: int32, from `engine.core.random.draw_key`.
        temperature: float32; 0 is greedy, and filters do not matter then.
        top_k: int32; 0 keeps all.
        top_p, min_p: float32; 1 and 0 keep all.
    """

    key_low: torch.Tensor
    key_high: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of each row.

    Attributes:
        chosen: [N] float32, of the drawn tokens.
        ranks: [N] int32, from 1; equals share one.
        top_ids, top_values: [N, most of `nums`, or V] int64 and float32, the likeliest first; as many of a row count
            as it asked for.
    """

    chosen: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor


def select_rows(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A copy of some rows, [N] int32, of [R, V] float32."""
    if target_of(logits) is not None or not cpu.serves(logits):
        return logits.index_select(0, rows)
    selected = logits.new_empty(len(rows), logits.shape[1])
    cpu.run("gather", len(rows), x=logits, indices=rows, size=logits.shape[1], output=selected)
    return selected


def mask_logits(logits: torch.Tensor, allowed_tokens: torch.Tensor) -> None:
    """Bans what a bitmask leaves out, in place.

    Args:
        logits: [R, V] float32.
        allowed_tokens: [R, ceil(V / 32)] int32; bit t % 32 of word t // 32 is set where token t may be drawn.
    """
    if target_of(logits) is not None:
        from engine.kernels.sample_triton import mask_in_triton

        mask_in_triton(logits, allowed_tokens)
    elif cpu.serves(logits):
        _adjust_in_c(logits, allowed=allowed_tokens)
    else:
        reference_mask(logits, allowed_tokens)


def reference_mask(logits: torch.Tensor, allowed_tokens: torch.Tensor) -> None:
    """What `mask_logits` does, with torch's operators."""
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_allowed = (allowed_tokens[:, :, None] >> bits & 1).flatten(1)[:, : logits.shape[1]] == 1
    logits.masked_fill_(~is_allowed, -math.inf)


def _adjust_in_c(
    logits: torch.Tensor, allowed: torch.Tensor | None = None, entries: Adjustments | None = None
) -> None:
    starts = None
    if entries is not None:
        starts = torch.searchsorted(entries.rows, torch.arange(logits.shape[0] + 1), out_int32=True)
    names = ("token_ids", "bias", "repetition", "subtract")
    _run_in_c(
        "adjust_logits",
        logits,
        allowed=allowed,
        starts=starts,
        **{name: None if entries is None else getattr(entries, name) for name in names},
    )


def _run_in_c(operation: str, logits: torch.Tensor, **arguments: Argument) -> None:
    """An operation of sample.c, on the CPU's threads: a row each."""
    num_rows, vocab_size = logits.shape
    cpu.run(
        operation,
        num_rows,
        min(num_rows, torch.get_num_threads()),
        logits=logits,
        vocab_size=vocab_size,
        **arguments,
    )


def reference_adjust(logits: torch.Tensor, entries: Adjustments) -> None:
    """Applies the entries to logits [R, V] float32 in place."""
    is_entry = (entries.token_ids >= 0) & (entries.token_ids < logits.shape[1])
    index = (entries.rows[is_entry].long(), entries.token_ids[is_entry].long())
    values = logits[index] + entries.bias[is_entry]
    repetition = entries.repetition[is_entry]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[index] = values - entries.subtract[is_entry]


def reference(logits: torch.Tensor, parameters: DrawParameters) -> torch.Tensor:
    """Tokens [R] int32 for logits [R, V] float32, each row's as `sample_row.draw` defines it."""
    keys = zip(parameters.key_low.tolist(), parameters.key_high.tolist(), strict=True)
    rows = zip(logits, keys, *_filters_of(parameters), strict=True)
    return torch.tensor([sample_row.draw(*row) for row in rows], dtype=torch.int32)


def reference_thresholds(logits: torch.Tensor, parameters: DrawParameters) -> torch.Tensor:
    """The smallest logit that each row's filters keep, or a smaller bound: [R] float32; -inf for all."""
    thresholds = [
        sample_row.threshold(row, temperature, top_k, top_p, min_p)
        if temperature > 0.0 and (row.max() / temperature).isfinite()
        else -math.inf
        for row, temperature, top_k, top_p, min_p in zip(logits, *_filters_of(parameters), strict=True)
    ]
    return torch.tensor(thresholds, dtype=torch.float32)


def _filters_of(parameters: DrawParameters) -> tuple[list[float], list[int], list[float], list[float]]:
    """Temperatures, top_k, top_p and min_p, a number a row each."""
    columns = parameters.temperature, parameters.top_k, parameters.top_p, parameters.min_p
    temperatures, top_k, top_p, min_p = (column.tolist() for column in columns)
    return temperatures, top_k, top_p, min_p


def reference_logprobs(logits: torch.Tensor, tokens: torch.Tensor, nums: Sequence[int]) -> Logprobs:
    """As `logprobs_of`, each row's as `sample_row.log_probabilities` defines them."""
    found = _empty_logprobs(logits, nums)
    for row, (token, num) in enumerate(zip(tokens.clamp(min=0).tolist(), nums, strict=True)):
        chosen, rank, top_ids, top_values = sample_row.log_probabilities(logits[row], token, num)
        found.chosen[row], found.ranks[row] = chosen, rank
        found.top_ids[row, :num], found.top_values[row, :num] = top_ids, top_values
    return found


def _empty_logprobs(logits: torch.Tensor, nums: Sequence[int]) -> Logprobs:
    num_rows, most = logits.shape[0], min(max(nums), logits.shape[1])
    return Logprobs(
        chosen=torch.empty(num_rows),
        ranks=torch.empty(num_rows, dtype=torch.int32),
        top_ids=torch.zeros(num_rows, most, dtype=torch.int64),
        top_values=torch.zeros(num_rows, most),
    )


def adjust_logits(logits: torch.Tensor, entries: Adjustments, tile: Tile | None = None) -> None:
    """Applies bias, penalties and bans to logits [R, V] float32, contiguous, in place."""
    target = target_of(logits)
    if target is None:
        adjust = _adjust_in_c if cpu.serves(logits) else reference_adjust
        adjust(logits, entries=entries)
        return
    from engine.kernels.sample_triton import adjust_in_triton

    adjust_in_triton(logits, entries, tile)


def _draw_in_c(logits: torch.Tensor, parameters: DrawParameters) -> torch.Tensor:
    tokens = torch.empty(logits.shape[0], dtype=torch.int32)
    names = ("key_low", "key_high", "temperature", "top_k", "top_p", "min_p")
    _run_in_c("draw_tokens", logits, tokens=tokens, **{name: getattr(parameters, name) for name in names})
    return tokens


def draw_tokens(
    logits: torch.Tensor,
    parameters: DrawParameters,
    *,
    filters: bool,
    last_tokens: torch.Tensor | None = None,
    table_rows: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Draws one token a row.

    Args:
        logits: [R, V] float32, contiguous, adjusted.
        filters: Whether any row has top_k, top_p or min_p; without, they are not looked at.
        last_tokens: int32 table that takes the tokens too (0 for -1), so that the next step finds them.
        table_rows: [R] int32, each row's place in it; -1 for none.

    Returns:
        [R] int32; -1 where a row has a NaN or its maximum (over the temperature, too) is not finite.
    """
    target = target_of(logits)
    if target is None:
        tokens = (_draw_in_c if cpu.serves(logits) else reference)(logits, parameters)
        if last_tokens is not None and table_rows is not None:
            table = last_tokens.numpy()
            for row, token in zip(table_rows.tolist(), tokens.tolist(), strict=True):
                if row >= 0:
                    table[row] = max(token, 0)
        return tokens
    from engine.kernels.sample_triton import draw_in_triton

    return draw_in_triton(
        logits, parameters, filters=filters, last_tokens=last_tokens, table_rows=table_rows, tile=tile
    )


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, nums: Sequence[int]) -> Logprobs:
    """Log-probabilities of the drawn tokens [N] int32, and of as many of the likeliest as each row asks for.

    The logits, [N, V] float32, are the model's own, from before `mask_logits` and `adjust_logits`. A row whose token
    is -1 gets numbers without meaning.
    """
    if target_of(logits) is None:
        return (_logprobs_in_c if cpu.serves(logits) else reference_logprobs)(logits, tokens, nums)
    from engine.kernels.sample_triton import logprobs_in_triton

    return logprobs_in_triton(logits, tokens, nums)


def _logprobs_in_c(logits: torch.Tensor, tokens: torch.Tensor, nums: Sequence[int]) -> Logprobs:
    found = _empty_logprobs(logits, nums)
    wanted = {name: getattr(found, name) for name in Logprobs.__slots__}
    _run_in_c(
        "logprobs_of",
        logits,
        tokens=tokens,
        nums=torch.tensor(nums, dtype=torch.int32),
        most=found.top_ids.shape[1],
        **wanted,
    )
    return found
