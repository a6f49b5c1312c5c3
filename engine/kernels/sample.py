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

sample_row.py defines it all; the bodies for CPUs (kernels/cpu/sample.c) equal that to the bit.

On a GPU a filtered draw reads the logits about twice. The first pass takes the largest logit of every 32.
A threshold over these maxima alone bounds the row's own from below, since the row has at least as many tokens
and as much mass above any value; so the groups whose maximum reaches the bound hold all that matters, commonly
a few hundred tokens, and one program a row finds the threshold among them by bisection. The second pass draws;
top_p without top_k takes one more, for the sum of all masses. A nucleus too flat for such a bound (from about 1%
of the vocabulary on) is searched over the whole row: correct, but up to some twenty passes. Temporary memory is
a sixteenth of the logits with filters; without, two words for each split of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels import cpu, sample_row
from engine.kernels.cpu.signatures import Argument
from engine.kernels.launch import Tile, launch, select_tile, target_of

GROUP_SIZE = 32
"""Logits that share a maximum: a cache line of 128 bytes."""

ROW_TILE = Tile({"BLOCK": 8192}, num_warps=16, num_stages=1)
"""One program a row. The order of its float sums follows from the tile, so it is no matter of tuning data."""

LOGPROB_TILE = Tile({"BLOCK": 4096}, num_warps=16, num_stages=1)
"""One program a row; its order of float sums is fixed with it, like that of `ROW_TILE`."""

MASK_TILE = Tile({"BLOCK": 1024}, num_warps=4, num_stages=1)

PICK_TILE = Tile({}, num_warps=1, num_stages=1)


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
        num_rows, vocab_size = logits.shape
        launch(
            _mask_kernel,
            (triton.cdiv(vocab_size, MASK_TILE["BLOCK"]), num_rows),
            {
                "logits": logits,
                "allowed": allowed_tokens,
                "vocab_size": vocab_size,
                "num_words": allowed_tokens.shape[1],
            },
            MASK_TILE,
        )
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


@triton.jit
def _mask_kernel(logits, allowed, vocab_size, num_words, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    token_ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = token_ids < vocab_size
    words = tl.load(allowed + row * num_words + token_ids // 32, is_token, -1)
    is_banned = is_token & (((words >> (token_ids % 32)) & 1) == 0)
    tl.store(logits + row * vocab_size + token_ids, float("-inf"), is_banned)


@triton.jit(do_not_specialize=["num_entries"])
def _adjust_kernel(
    logits, rows, token_ids, bias, repetition, subtract, num_entries, vocab_size, BLOCK: tl.constexpr
):
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_entry = entries < num_entries
    token = tl.load(token_ids + entries, is_entry, 0)
    is_entry = is_entry & (token >= 0) & (token < vocab_size)
    pointers = logits + tl.load(rows + entries, is_entry, 0).to(tl.int64) * vocab_size + token
    values = tl.load(pointers, is_entry, 0.0) + tl.load(bias + entries, is_entry, 0.0)
    penalty = tl.load(repetition + entries, is_entry, 1.0)
    values = tl.where(values > 0, tl.div_rn(values, penalty), values * penalty)
    tl.store(pointers, values - tl.load(subtract + entries, is_entry, 0.0), is_entry)


@triton.jit
def _has_filter(row, temperature, top_k, top_p, min_p):
    filters = (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1.0) | (tl.load(min_p + row) > 0.0)
    return (tl.load(temperature + row) > 0.0) & filters


@triton.jit
def _maxima_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    maxima,
    vocab_size,
    num_groups,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of each GROUP_SIZE logits, in rows that have a filter."""
    GROUPS: tl.constexpr = BLOCK // GROUP_SIZE
    row = tl.program_id(1)
    if _has_filter(row, temperature, top_k, top_p, min_p):
        groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        offsets = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
        values = tl.load(
            logits + row.to(tl.int64) * vocab_size + offsets, offsets < vocab_size, float("-inf")
        )
        tl.store(maxima + row * num_groups + groups, tl.max(values, axis=1), groups < num_groups)


@triton.jit
def _read_groups(
    values,
    listed,
    first,
    num_groups,
    num_values,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BLOCK / GROUP_SIZE, GROUP_SIZE] values of the groups from `first` on: listed ones, or simply all."""
    groups = first + tl.arange(0, BLOCK // GROUP_SIZE)
    is_group = groups < num_groups
    if listed is not None:
        groups = tl.load(listed + groups, is_group, 0)
    offsets = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    return tl.load(values + offsets, is_group[:, None] & (offsets < num_values), float("-inf"))


@triton.jit
def _weight_from(
    values,
    listed,
    num_groups,
    num_values,
    pivot,
    largest,
    temperature,
    MASSES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mass (or number) of the values >= pivot; and by element the least of them and the largest below."""
    STEP: tl.constexpr = BLOCK // GROUP_SIZE
    scale = 1.0 / temperature
    weights = tl.zeros((STEP, GROUP_SIZE), tl.float32)
    above = tl.full((STEP, GROUP_SIZE), float("inf"), tl.float32)
    below = tl.full((STEP, GROUP_SIZE), float("-inf"), tl.float32)
    for first in range(0, num_groups, STEP):
        read = _read_groups(values, listed, first, num_groups, num_values, GROUP_SIZE, BLOCK)
        is_above = read >= pivot
        if MASSES:
            weights += tl.where(is_above, tl.exp((read - largest) * scale), 0.0)
        else:
            weights += tl.where(is_above, 1.0, 0.0)
        above = tl.where(is_above, tl.minimum(above, read), above)
        below = tl.where(is_above, below, tl.maximum(below, read))
    return tl.sum(weights), above, below


@triton.jit
def _ordered(bits):
    """The bits of a float as an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _middle(low, high, pass_index):
    """A pivot with low < pivot <= high.

    Halving the values is quick where they are spread evenly. Every other time it is the list of all floats that
    is halved, so that the search ends within 64 passes whatever the values are.
    """
    low_key = _ordered(low.to(tl.int32, bitcast=True))
    high_key = _ordered(high.to(tl.int32, bitcast=True))
    key = (low_key >> 1) + (high_key >> 1) + (low_key & high_key & 1)
    middle = tl.where(
        pass_index % 2 == 0, low + (high - low) * 0.5, _ordered(key).to(tl.float32, bitcast=True)
    )
    return tl.where((middle > low) & (middle <= high), middle, high)


@triton.jit
def _search(
    values,
    listed,
    num_groups,
    num_values,
    floor,
    target,
    largest,
    temperature,
    MASSES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of the values (at least `floor`) for which those >= it weigh `target`; else `floor`."""
    low = floor
    high = largest
    pass_index = 0
    while low < high:
        pivot = _middle(low, high, pass_index)
        weight, above, below = _weight_from(
            values, listed, num_groups, num_values, pivot, largest, temperature, MASSES, GROUP_SIZE, BLOCK
        )
        # The bracket ends on values that are there, so it closes as soon as none is left between.
        reaches = weight >= target
        nearest = tl.max(tl.where(reaches, -above, below))
        low = tl.where(reaches, -nearest, low)
        high = tl.where(reaches, high, nearest)
        pass_index += 1
    return low


@triton.jit
def _bound_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    maxima,
    listed,
    num_listed,
    largests,
    totals,
    bounds,
    vocab_size,
    num_groups,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: a lower bound of the threshold, from the maxima, and the groups that reach it.

    Beside these the largest logit and, where top_k does not come first, the mass of what top_p chooses from.
    """
    row = tl.program_id(0)
    if _has_filter(row, temperature, top_k, top_p, min_p):
        logits += row.to(tl.int64) * vocab_size
        maxima += row * num_groups
        t = tl.load(temperature + row)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        fraction = tl.load(min_p + row)
        largest = tl.full((), float("-inf"), tl.float32)
        for first in range(0, num_groups, BLOCK):
            groups = first + tl.arange(0, BLOCK)
            values = tl.load(maxima + groups, groups < num_groups, float("-inf"))
            largest = tl.maximum(largest, tl.max(values))
        bound = tl.full((), float("-inf"), tl.float32)
        if fraction > 0.0:
            bound = largest + t * tl.log(fraction)
        num_rows_of_maxima = num_groups // GROUP_SIZE
        if (k > 0) & (k < vocab_size):
            target = k.to(tl.float32)
            bound = _search(
                maxima,
                None,
                num_rows_of_maxima,
                num_groups,
                bound,
                target,
                largest,
                t,
                False,
                GROUP_SIZE,
                BLOCK,
            )
        elif p < 1.0:
            total, _, _ = _weight_from(
                logits, None, num_groups, vocab_size, bound, largest, t, True, GROUP_SIZE, BLOCK
            )
            tl.store(totals + row, total)
            # Tokens below (1 - p) / V of the likeliest together weigh less than 1 - p; 1 more against rounding.
            bound = tl.maximum(bound, largest + t * (tl.log((1.0 - p) / vocab_size) - 1.0))
            bound = _search(
                maxima,
                None,
                num_rows_of_maxima,
                num_groups,
                bound,
                p * total,
                largest,
                t,
                True,
                GROUP_SIZE,
                BLOCK,
            )
        tl.store(largests + row, largest)
        tl.store(bounds + row, bound)
        num_reaching = 0
        for first in range(0, num_groups, BLOCK):
            groups = first + tl.arange(0, BLOCK)
            is_group = groups < num_groups
            reaches = (is_group & (tl.load(maxima + groups, is_group, 0.0) >= bound)).to(tl.int32)
            places = row * num_groups + num_reaching + tl.cumsum(reaches, 0) - 1
            tl.store(listed + places, groups, reaches != 0)
            num_reaching += tl.sum(reaches)
        tl.store(num_listed + row, num_reaching)


@triton.jit
def _threshold_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    listed,
    num_listed,
    largests,
    totals,
    bounds,
    thresholds,
    vocab_size,
    num_groups,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: its threshold, from the groups that reach its bound."""
    row = tl.program_id(0)
    threshold = tl.full((), float("-inf"), tl.float32)
    if _has_filter(row, temperature, top_k, top_p, min_p):
        logits += row.to(tl.int64) * vocab_size
        listed += row * num_groups
        num = tl.load(num_listed + row)
        largest = tl.load(largests + row)
        t = tl.load(temperature + row)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        threshold = tl.load(bounds + row)
        has_top_k = (k > 0) & (k < vocab_size)
        if has_top_k:
            target = k.to(tl.float32)
            threshold = _search(
                logits, listed, num, vocab_size, threshold, target, largest, t, False, GROUP_SIZE, BLOCK
            )
        if p < 1.0:
            if has_top_k:
                total, _, _ = _weight_from(
                    logits, listed, num, vocab_size, threshold, largest, t, True, GROUP_SIZE, BLOCK
                )
            else:
                total = tl.load(totals + row)
            threshold = _search(
                logits, listed, num, vocab_size, threshold, p * total, largest, t, True, GROUP_SIZE, BLOCK
            )
    tl.store(thresholds + row, threshold)


@triton.jit
def _mix32(bits):
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _uniform(token_ids, key_low, key_high):
    """Uniform noise, equal to that of `engine.kernels.noise.uniform_noise` to the bit."""
    low = key_low.to(tl.uint32, bitcast=True)
    high = key_high.to(tl.uint32, bitcast=True)
    bits = _mix32(_mix32(token_ids.to(tl.uint32) ^ low) + high)
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)


@triton.jit
def _gumbel(u):
    """-log(-log(1 - u)), without losing the digits of a small u."""
    # log(1 - u) = log(rounded) + lost / (1 - u) to first order, where `lost` is what rounding 1 - u has lost: it
    # is exact, at most 2^-25, and 0 from u = 1/2 on, so that 1 + u may stand for 1 / (1 - u).
    rounded = 1.0 - u
    lost = (1.0 - rounded) - u
    return -tl.log(-(tl.log(rounded) + (lost + lost * u)))


@triton.jit
def _draw_kernel(
    logits,
    key_low,
    key_high,
    temperature,
    thresholds,
    best_scores,
    best_ids,
    vocab_size,
    num_splits,
    BLOCK: tl.constexpr,
):
    """The best token of each BLOCK; its score is infinite where a logit is not a number or is infinity."""
    split = tl.program_id(0)
    row = tl.program_id(1)
    token_ids = split * BLOCK + tl.arange(0, BLOCK)
    logits += row.to(tl.int64) * vocab_size
    values = tl.load(logits + token_ids, token_ids < vocab_size, float("-inf"))
    is_broken = tl.max(((values != values) | (values == float("inf"))).to(tl.int32), axis=0) != 0
    if thresholds is not None:
        values = tl.where(values >= tl.load(thresholds + row), values, float("-inf"))
    t = tl.load(temperature + row)
    if t > 0.0:
        u = _uniform(token_ids, tl.load(key_low + row), tl.load(key_high + row))
        values = tl.div_rn(values, t) + _gumbel(u)
    score, index = tl.max(values, axis=0, return_indices=True)
    partial = row * num_splits + split
    tl.store(best_scores + partial, tl.where(is_broken, float("inf"), score))
    tl.store(best_ids + partial, split * BLOCK + index)


@triton.jit
def _pick_kernel(
    best_scores, best_ids, tokens, last_tokens, table_rows, num_splits, MAX_SPLITS: tl.constexpr
):
    """The best of a row's partial results."""
    row = tl.program_id(0)
    splits = tl.arange(0, MAX_SPLITS)
    scores = tl.load(best_scores + row * num_splits + splits, splits < num_splits, float("-inf"))
    score, index = tl.max(scores, axis=0, return_indices=True)
    is_valid = (score > float("-inf")) & (score < float("inf"))
    token = tl.where(is_valid, tl.load(best_ids + row * num_splits + index), -1)
    tl.store(tokens + row, token)
    if last_tokens is not None:
        table_row = tl.load(table_rows + row)
        tl.store(last_tokens + table_row, tl.maximum(token, 0), table_row >= 0)


@triton.jit
def _logprob_kernel(logits, tokens, log_sums, chosen, ranks, vocab_size, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab_size
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        token_ids = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(logits + token_ids, token_ids < vocab_size, float("-inf")))
    peak = tl.max(largest)
    chosen_logit = tl.load(logits + tl.maximum(tl.load(tokens + row), 0))
    masses = tl.zeros((BLOCK,), tl.float32)
    better = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab_size, BLOCK):
        token_ids = first + tl.arange(0, BLOCK)
        values = tl.load(logits + token_ids, token_ids < vocab_size, float("-inf"))
        masses += tl.exp(values - peak)
        better += (values > chosen_logit).to(tl.int32)
    log_sum = peak + tl.log(tl.sum(masses))
    tl.store(log_sums + row, log_sum)
    tl.store(chosen + row, chosen_logit - log_sum)
    tl.store(ranks + row, tl.sum(better) + 1)


def adjust_logits(logits: torch.Tensor, entries: Adjustments, tile: Tile | None = None) -> None:
    """Applies bias, penalties and bans to logits [R, V] float32, contiguous, in place."""
    target = target_of(logits)
    if target is None:
        adjust = _adjust_in_c if cpu.serves(logits) else reference_adjust
        adjust(logits, entries=entries)
        return
    num_entries = entries.rows.shape[0]
    tile = tile or select_tile(target, "sample_adjust", num_entries)
    launch(
        _adjust_kernel,
        (triton.cdiv(num_entries, tile["BLOCK"]),),
        {
            "logits": logits,
            "rows": entries.rows,
            "token_ids": entries.token_ids,
            "bias": entries.bias,
            "repetition": entries.repetition,
            "subtract": entries.subtract,
            "num_entries": num_entries,
            "vocab_size": logits.shape[1],
        },
        tile,
    )


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
    num_rows, vocab_size = logits.shape
    tile = tile or select_tile(target, "sample_draw", num_rows)
    thresholds = find_thresholds(logits, parameters) if filters else None
    num_splits = triton.cdiv(vocab_size, tile["BLOCK"])
    best_scores = torch.empty(num_rows, num_splits, dtype=torch.float32, device=logits.device)
    best_ids = torch.empty(num_rows, num_splits, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    launch(
        _draw_kernel,
        (num_splits, num_rows),
        {
            "logits": logits,
            "key_low": parameters.key_low,
            "key_high": parameters.key_high,
            "temperature": parameters.temperature,
            "thresholds": thresholds,
            "best_scores": best_scores,
            "best_ids": best_ids,
            "vocab_size": vocab_size,
            "num_splits": num_splits,
        },
        tile,
    )
    launch(
        _pick_kernel,
        (num_rows,),
        {
            "best_scores": best_scores,
            "best_ids": best_ids,
            "tokens": tokens,
            "last_tokens": last_tokens,
            "table_rows": table_rows,
            "num_splits": num_splits,
        },
        PICK_TILE,
        MAX_SPLITS=triton.next_power_of_2(num_splits),
    )
    return tokens


def find_thresholds(
    logits: torch.Tensor,
    parameters: DrawParameters,
    tile: Tile | None = None,
    row_tile: Tile = ROW_TILE,
) -> torch.Tensor:
    """The thresholds of `reference_thresholds`, found by Triton's kernels."""
    target = target_of(logits)
    assert target is not None
    num_rows, vocab_size = logits.shape
    tile = tile or select_tile(target, "sample_maxima", num_rows)
    # Whole groups of maxima, so that their rows are aligned; what lies beyond the vocabulary is -inf.
    num_groups = GROUP_SIZE * triton.cdiv(vocab_size, GROUP_SIZE**2)
    maxima = torch.empty(num_rows, num_groups, dtype=torch.float32, device=logits.device)
    listed = torch.empty(num_rows, num_groups, dtype=torch.int32, device=logits.device)
    num_listed = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    largests, totals, bounds, thresholds = torch.empty(
        4, triton.cdiv(num_rows, 4) * 4, dtype=torch.float32, device=logits.device
    )
    inputs = {
        "logits": logits,
        "temperature": parameters.temperature,
        "top_k": parameters.top_k,
        "top_p": parameters.top_p,
        "min_p": parameters.min_p,
    }
    found = {
        "listed": listed,
        "num_listed": num_listed,
        "largests": largests,
        "totals": totals,
        "bounds": bounds,
    }
    sizes = {"vocab_size": vocab_size, "num_groups": num_groups}
    launch(
        _maxima_kernel,
        (triton.cdiv(num_groups * GROUP_SIZE, tile["BLOCK"]), num_rows),
        inputs | {"maxima": maxima} | sizes,
        tile,
        GROUP_SIZE=GROUP_SIZE,
    )
    launch(
        _bound_kernel,
        (num_rows,),
        inputs | {"maxima": maxima} | found | sizes,
        row_tile,
        GROUP_SIZE=GROUP_SIZE,
    )
    launch(
        _threshold_kernel,
        (num_rows,),
        inputs | found | {"thresholds": thresholds} | sizes,
        row_tile,
        GROUP_SIZE=GROUP_SIZE,
    )
    return thresholds[:num_rows]


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, nums: Sequence[int]) -> Logprobs:
    """Log-probabilities of the drawn tokens [N] int32, and of as many of the likeliest as each row asks for.

    The logits, [N, V] float32, are the model's own, from before `mask_logits` and `adjust_logits`. A row whose token
    is -1 gets numbers without meaning.
    """
    if target_of(logits) is None:
        return (_logprobs_in_c if cpu.serves(logits) else reference_logprobs)(logits, tokens, nums)
    num_rows, vocab_size = logits.shape
    top_values, top_ids = logits.topk(min(max(nums), vocab_size))
    log_sums = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    chosen = torch.empty_like(log_sums)
    ranks = torch.empty_like(tokens)
    launch(
        _logprob_kernel,
        (num_rows,),
        {
            "logits": logits,
            "tokens": tokens,
            "log_sums": log_sums,
            "chosen": chosen,
            "ranks": ranks,
            "vocab_size": vocab_size,
        },
        LOGPROB_TILE,
    )
    return Logprobs(chosen, ranks, top_ids, top_values - log_sums[:, None])


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
