"""Counts of tokens as OpenAI's completions and chats give them."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from api.bodies import PromptTokensDetails, Usage
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
