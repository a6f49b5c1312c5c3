"""WaitRecord: for whom a rank waits, as its groups publish it, so that who watches over ranks need not guess.

An exchange that a GPU makes by itself, with NCCL, symmetric memory or in a CUDA graph, keeps no thread of the host.
Its rank waits where it needs the GPU next, where a step's tokens are read or the next but one is written, and the
record then shows all with whom the GPU exchanges ("device"). A launch that waits since too many are under way already
is the one wait that no record shows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

Kind = Literal[
    "rendezvous", "gather", "sum", "one-shot sum", "scatter", "largest", "smallest", "send", "receive",
    "device", "order", "tokens",
]  # fmt: skip
"""What a rank waits for others in: "order" is for what rank 0 says next, "tokens" for what the last stage draws."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a rank waits for at one moment.

    Attributes:
        ranks: Those that it waits for, by their numbers among all of the engine; none while it runs.
        kind: In what; None while it runs.
        since: When it began to, in seconds of `time.monotonic`; of no meaning while it runs.
        num_finished: Waits that have ended before, but for those that an error ended.
    """

    ranks: tuple[int, ...] = ()
    kind: Kind | None = None
    since: float = 0.0
    num_finished: int = 0


class WaitRecord:
    """Is written by the thread that runs steps, and read by any other.

    All that a reader sees is one tuple, which the writer replaces as a whole: it needs no lock, and a wait costs less
    than a microsecond.

    Attributes:
        failed: What the rank waited in when an error first ended it: then others may be the cause.
    """

    __slots__ = ("_now", "failed")

    def __init__(self) -> None:
        self._now: tuple[tuple[int, ...], Kind | None, float, int] = (), None, 0.0, 0
        self.failed: Kind | None = None

    @property
    def now(self) -> Waiting:
        return Waiting(*self._now)

    def waiting(self, ranks: tuple[int, ...], kind: Kind) -> Wait:
        """A context in which this rank waits for others; within another one it stands for that meanwhile."""
        return Wait(self, ranks, kind)


class Wait:
    """The context of a wait; a generator's would take three times as long."""

    __slots__ = ("_before", "_kind", "_ranks", "_record")

    def __init__(self, record: WaitRecord, ranks: tuple[int, ...], kind: Kind) -> None:
        self._record, self._ranks, self._kind = record, ranks, kind

    def __enter__(self) -> None:
        self._before = before = self._record._now
        self._record._now = self._ranks, self._kind, time.monotonic(), before[3]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        record, (ranks, before, since, _) = self._record, self._before
        record._now = ranks, before, since, record._now[3] + (error is None)
        if error is not None and record.failed is None:
            record.failed = self._kind
