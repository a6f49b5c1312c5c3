"""The queue of sequences that wait for a place in the running batch.

    ready: a level a priority ─ a line an owner, in order of arrival ── pop ──▶ admitted
       ▲                                                            └─ park ─▶ parked under what it waits for: a
       └──────────── release, once that is there or lost ───────────────┘      block, or a sequence

The first is of the level with the smallest priority, there of the owner who has been served least, there the first
that came. Priorities do not starve: a level that `MAX_PASSED` admissions have passed over has the next one, and what
is admitted so counts from then on as if it had the priority of those that it goes before. Such turns are one in as
many admissions, so that one in a level waits for at most (MAX_PASSED + 1) x levels x (its place in the level)
admissions.

What is done to one sequence costs no more where many wait: one that ends in a line is dropped when its turn comes.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from engine.core.request import Sequence, SequenceStatus

MAX_PASSED = 16
"""How many admissions may pass over a priority before it has one."""


@dataclass(slots=True)
class _Level:
    """Waiting sequences of one priority.

    Attributes:
        since: The number of the last admission that did not pass it over.
        lines: By owner, heaps of (arrival, sequence).
        order: A heap with an entry for each line: what its owner was served, and who came first, as far as known.
    """

    since: int
    lines: dict[str, list[tuple[int, Sequence]]] = field(default_factory=dict)
    order: list[tuple[int, int, str]] = field(default_factory=list)

    def push(self, sequence: Sequence, served: Mapping[str, int]) -> None:
        owner = sequence.owner
        if owner not in self.lines:
            self.lines[owner] = []
            heapq.heappush(self.order, (served.get(owner, 0), sequence.arrival, owner))
        heapq.heappush(self.lines[owner], (sequence.arrival, sequence))

    def first(self, served: Mapping[str, int]) -> Sequence | None:
        """The first that has not ended; drops those before it that have."""
        while self.order:
            owner = self.order[0][-1]
            line = self.lines[owner]
            while line and line[0][-1].status is not SequenceStatus.WAITING:
                heapq.heappop(line)
            if not line:
                heapq.heappop(self.order)
                del self.lines[owner]
                continue
            arrival, sequence = line[0]
            entry = (served.get(owner, 0), arrival, owner)
            if entry == self.order[0]:
                return sequence
            # Counts only grow: whoever is first by what was known of all is so, once that is still true.
            heapq.heapreplace(self.order, entry)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Takes out what `first` has returned."""
        heapq.heappop(self.lines[sequence.owner])


class WaitingQueue:
    """Sequences of status WAITING.

    Args:
        served: Tokens that each owner was served; they only grow while the owner has sequences here.
    """

    def __init__(self, served: Mapping[str, int]) -> None:
        self._served = served
        # By priority, the one first whose last admission is longest ago.
        self._levels: dict[int, _Level] = {}
        # A heap that holds the priorities of all levels, and some that no level has any more.
        self._priorities: list[int] = []
        self._num_admitted = self._last_turn = 0
        # Sequences in lines that wait, and those that have ended since all lines were last swept.
        self._num_ready = self._num_ended = 0
        # The keys are ordered sets: who ends is taken out.
        self._parked: dict[Hashable, dict[Sequence, None]] = {}
        self._keys: dict[Sequence, Hashable] = {}

    def __len__(self) -> int:
        return self._num_ready + len(self._keys)

    def push(self, sequence: Sequence) -> None:
        self._line_up(sequence, self._num_admitted)
        self._num_ready += 1

    def first(self) -> Sequence | None:
        """The next of those that wait for nothing but a place."""
        while self._levels:
            priority = self._next_priority()
            sequence = self._levels[priority].first(self._served)
            if sequence is not None:
                return sequence
            del self._levels[priority]
        return None

    def pop(self) -> None:
        """Takes out what `first` has returned: it is admitted."""
        sequence = self._take()
        priority, best = sequence.priority, self._best_priority()
        self._num_admitted += 1
        # Its level goes behind all others.
        level = self._levels.pop(priority)
        level.since = self._num_admitted
        self._levels[priority] = level
        if priority != best:
            self._last_turn = self._num_admitted
            sequence.priority = best

    def park(self, key: Hashable) -> None:
        """Lets what `first` has returned wait until `key` is released."""
        sequence = self._take()
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
        self._num_ready -= 1
        self._num_ended += 1
        # Memory stays that of twice as many as live.
        if self._num_ended > self._num_ready:
            self._sweep()

    def _next_priority(self) -> int:
        oldest = next(iter(self._levels))
        passed_over = self._num_admitted - max(self._levels[oldest].since, self._last_turn)
        return oldest if passed_over >= MAX_PASSED else self._best_priority()

    def _best_priority(self) -> int:
        while self._priorities[0] not in self._levels:
            heapq.heappop(self._priorities)
        return self._priorities[0]

    def _take(self) -> Sequence:
        sequence = self.first()
        assert sequence is not None
        self._levels[sequence.priority].remove(sequence)
        self._num_ready -= 1
        return sequence

    def _line_up(self, sequence: Sequence, since: int) -> None:
        priority = sequence.priority
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level(since)
            heapq.heappush(self._priorities, priority)
            if len(self._priorities) > 2 * len(self._levels):
                self._priorities = sorted(self._levels)
        level.push(sequence, self._served)

    def _sweep(self) -> None:
        """Drops all that have ended."""
        levels, self._levels, self._priorities, self._num_ended = self._levels, {}, [], 0
        for level in levels.values():
            for line in level.lines.values():
                for _, sequence in line:
                    if sequence.status is SequenceStatus.WAITING:
                        self._line_up(sequence, level.since)
