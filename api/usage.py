"""Counts and times of tokens as completions and chats give them."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from api.bodies import PromptTokensDetails, Timings, Usage
from api.generation import TokenCounter
from api.protocol import StreamOptions


def usage_of(counter: TokenCounter) -> Usage:
    """The counts so far."""
    return Usage(
        prompt_tokens=counter.num_prompt_tokens,
        completion_tokens=counter.num_completion_tokens,
        total_tokens=counter.num_prompt_tokens + counter.num_completion_tokens,
        prompt_tokens_details=PromptTokensDetails(counter.num_cached_tokens),
    )


def timings_of(counter: TokenCounter) -> Timings:
    """The times so far."""
    num_computed = counter.num_prompt_tokens - counter.num_cached_tokens
    first, last = counter.first or 0.0, counter.last or 0.0
    return Timings(
        counter.num_cached_tokens,
        *_timing(num_computed, 1000 * first),
        *_timing(counter.num_completion_tokens, 1000 * (last - first)),
    )


def _timing(num_tokens: int, milliseconds: float) -> tuple[int, float, float | None, float | None]:
    """What `Timings` says of some tokens: their number and time, the time of each, and how many a second."""
    each = milliseconds / num_tokens if num_tokens else None
    rate = 1000 * num_tokens / milliseconds if milliseconds else None
    return num_tokens, milliseconds, each, rate


def chunk_usage(counter: TokenCounter, options: StreamOptions | None) -> Usage | UnsetType | None:
    """What the usage field of a chunk that carries choices holds."""
    if options is None:
        return UNSET
    if options.continuous_usage_stats:
        return usage_of(counter)
    return None if options.include_usage else UNSET


def has_usage_chunk(options: StreamOptions | None) -> bool:
    """Whether a last chunk gives the counts."""
    return options is not None and bool(options.include_usage)
