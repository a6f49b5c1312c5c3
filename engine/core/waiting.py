"""The queue of sequences that wait for a place in the running batch.

    ready (a heap, in order) ── pop ──▶ admitted
       ▲                        └─ park ─▶ parked under what it waits for: a block, or a sequence
       └──────── release, once that is there or lost ───────┘

What is done to one sequence costs no more where many wait: one that ends in the heap is dropped when its turn comes.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable

from engine.core.request import Sequence, SequenceStatus


class WaitingQueue:
    """Sequences of status WAITING, by priority and arrival."""

    def __init__(self) -> None:
        self._ready: list[tuple[int, int, Sequence]] = []
        # Entries of the heap whose sequences have ended.
        self._num_ended = 0
        # The keys are ordered sets: who ends is taken out.
        self._parked: dict[Hashable, dict[Sequence, None]] = {}
        self._keys: dict[Sequence, Hashable] = {}

    def __len__(self) -> int:
        return len(self._ready) - self._num_ended + len(self._keys)

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._ready, (*sequence.order, sequence))

    def first(self) -> Sequence | None:
        """The first of those that wait for nothing but a place."""
        while self._ready:
            sequence = self._ready[0][-1]
            if sequence.status is SequenceStatus.WAITING:
                return sequence
            heapq.heappop(self._ready)
            self._num_ended -= 1
        return None

    def pop(self) -> None:
        """Takes out what `first` has returned."""
        heapq.heappop(self._ready)

    def park(self, key: Hashable) -> None:
        """Lets what `first` has returned wait until `key` is released."""
        sequence = heapq.heappop(self._ready)[-1]
        self._parked.setdefault(key, {})[sequence] = None
        self._keys[sequence] = key

    def release(self, key: Hashable) -> None:
        """Lets those that wait for `key` take their turns again."""
        for sequence in self._parked.pop(key, ()):
            del self._keys[sequence]
            self.push(sequence)

    def end(self, sequence: Sequence) -> None:
        """Forgets a sequence that waits, and has ended."""
        key = self._keys.pop(sequence, None)
        if key is not None:
            del self._parked[key][sequence]
            if not self._parked[key]:
                del self._parked[key]
            return
        self._num_ended += 1
        # Memory stays that of twice as many as live.
        if self._num_ended > len(self._ready) // 2:
            self._ready = [entry for entry in self._ready if entry[-1].status is SequenceStatus.WAITING]
            heapq.heapify(self._ready)
            self._num_ended = 0
