"""Bans: which tokens a request never wants, and which would complete a word that it bans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Bitmask = np.ndarray[tuple[int], np.dtype[np.int32]]
"""[ceil(vocabulary / 32)]; bit t % 32 of word t // 32 is set where token t may come."""

TokenSequence = tuple[int, ...]


def bitmask_of(token_ids: Iterable[int], vocab_size: int) -> Bitmask:
    """The mask of these tokens; those outside the vocabulary are left out."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[[token_id for token_id in token_ids if token_id < vocab_size]] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def completing_tokens(
    words: Iterable[TokenSequence], token_ids: Sequence[int], num_output_tokens: int
) -> tuple[int, ...]:
    """The tokens that would complete one of the words in the output, the last so many of `token_ids`."""
    return tuple(
        word[-1]
        for word in words
        if len(word) == 1
        or (len(word) <= num_output_tokens + 1 and tuple(token_ids[1 - len(word) :]) == word[:-1])
    )
