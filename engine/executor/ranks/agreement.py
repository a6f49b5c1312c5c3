"""Where ranks stand: whether they agree on a step, and which of them one that is late waits for."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from engine.core.request import PooledState, RowResult, SampledToken, ScoredPrompt
from engine.parallel.waiting import Kind, WaitRecord
from engine.process import whereabouts


def digest_of(order: bytes, results: Sequence[RowResult]) -> bytes:
    """A hash of a step, as it was ordered, and of what came of it: the same on all ranks that agree."""
    said = [_said(result) for result in results]
    return hashlib.blake2b(msgspec.msgpack.encode((order, said)), digest_size=16).digest()


def _said(result: RowResult) -> int | bytes | None:
    match result:
        case SampledToken():
            return result.token_id
        case ScoredPrompt():
            return _said(result.token)
        case PooledState():
            return result.values
    return None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a rank stands.

    Attributes:
        place: What its thread is in, for people to read: "sampler.py:80 in sample".
        ranks, kind, num_finished: As in `engine.parallel.waiting.Waiting`.
        seconds: For how long it has been waiting.
    """

    place: str
    ranks: tuple[int, ...] = ()
    kind: Kind | None = None
    seconds: float = 0.0
    num_finished: int = 0

    @classmethod
    def of(cls, record: WaitRecord, thread_id: int) -> Standing:
        """Where this process stands, whose steps that thread runs."""
        now = record.now
        places = whereabouts(thread_id)
        seconds = time.monotonic() - now.since if now.ranks else 0.0
        return cls(places[0] if places else "no thread", now.ranks, now.kind, seconds, now.num_finished)

    def __str__(self) -> str:
        """For whom it waits: "for 0 and 2 (sum, 41.2 s, after 310 others)"."""
        ranks = " and ".join(map(str, self.ranks))
        return f"for {ranks} ({self.kind}, {self.seconds:.1f} s, after {self.num_finished} others)"


def awaited(late: Iterable[int], waits_for: Mapping[int, Iterable[int]]) -> list[int]:
    """The ranks that late ones wait for in the end, themselves perhaps.

    Who waits is followed to those for whom it waits, and from these on: to a rank that waits for nobody, or to
    several that wait for each other, and for nobody else.

    Args:
        waits_for: Of each rank that may be at fault; others count for nothing.
    """
    followed = {rank: _followed(rank, waits_for) for rank in waits_for}
    reached = {other for rank in late for other in followed[rank]}
    return sorted(rank for rank in reached if all(rank in followed[other] for other in followed[rank]))


def _followed(rank: int, waits_for: Mapping[int, Iterable[int]]) -> set[int]:
    """A rank, and all to whom those lead for whom it waits."""
    found, left = set[int](), [rank]
    while left:
        one = left.pop()
        if one in waits_for and one not in found:
            found.add(one)
            left += waits_for[one]
    return found
