"""Whether ranks agree on a step, and whether one waits for the others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from engine.core.request import RowFailure, SampledToken

Drawn = Sequence[SampledToken | RowFailure | None]


EXCHANGES = ("shared_places.py:", "group.py:", "pipeline.py:", "place.py:")


def is_exchange(places: list[str]) -> bool:
    """Whether a thread, by its `whereabouts`, waits for other ranks in a group of theirs."""
    return any(place.startswith(EXCHANGES) for place in places)


def digest_of(order: bytes, drawn: Drawn) -> bytes:
    """Of a step, as it was ordered, and what came of it: the same on all ranks that agree."""
    tokens = [row.token_id if isinstance(row, SampledToken) else None for row in drawn]
    return hashlib.blake2b(msgspec.msgpack.encode((order, tokens)), digest_size=16).digest()
