"""The Triton bodies of `engine.kernels.sample`.

On a GPU a filtered draw reads the logits about twice. The first pass takes the largest logit of every 32.
A threshold over these maxima alone bounds the row's own from below, since the row has at least as many tokens
and as much mass above any value; so the groups whose maximum reaches the bound hold all that matters, commonly
a few hundred tokens, and one program a row finds the threshold among them by bisection. The second pass draws;
top_p without top_k takes one more, for the sum of all masses. A nucleus too flat for such a bound (from about 1%
of the vocabulary on) is searched over the whole row: correct, but up to some twenty passes. Temporary memory is
a sixteenth of the logits with filters; without, two words for each split of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Tile, launch, select_tile, target_of
from engine.kernels.sample import Adjustments, DrawParameters, Logprobs

GROUP_SIZE = 32
"""Logits that share a maximum: a cache line of 128 bytes."""

ROW_TILE = Tile({"BLOCK": 8192}, num_warps=16, num_stages=1)
"""One program a row. The order of its float sums follows from the tile, so it is no matter of tuning data."""

LOGPROB_TILE = Tile({"BLOCK": 4096}, num_warps=16, num_stages=1)
"""One program a row; its order of float sums is fixed with it, like that of `ROW_TILE`."""

MASK_TILE = Tile({"BLOCK": 1024}, num_warps=4, num_stages=1)

PICK_TILE = Tile({}, num_warps=1, num_stages=1)


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


def mask_in_triton(logits: torch.Tensor, allowed_tokens: torch.Tensor) -> None:
    """`mask_logits` in one launch."""
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


def adjust_in_triton(logits: torch.Tensor, entries: Adjustments, tile: Tile | None) -> None:
    """`adjust_logits` in one launch."""
    target = target_of(logits)
    assert target is not None
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


def draw_in_triton(
    logits: torch.Tensor,
    parameters: DrawParameters,
    *,
    filters: bool,
    last_tokens: torch.Tensor | None,
    table_rows: torch.Tensor | None,
    tile: Tile | None,
) -> torch.Tensor:
    """`draw_tokens` in two launches; with filters in five."""
    target = target_of(logits)
    assert target is not None
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


def logprobs_in_triton(logits: torch.Tensor, tokens: torch.Tensor, nums: Sequence[int]) -> Logprobs:
    """`logprobs_of` by one launch and torch's top k."""
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
