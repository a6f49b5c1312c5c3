"""What the last steps computed and why others waited, kept to be looked at: ids and counts, no tokens and no text.

A ring of so many bytes. What a step costs here is one entry, whatever waits: why a sequence waited is told by what
stopped the admission of the first in the queue, step by step.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.core.request import Sequence

MAX_BYTES = 4 * 2**20

WaitReason = Literal["", "blocks", "budget", "places", "hashing", "preemption"]
"""What keeps the first of those that wait from running: nothing; its blocks are not free; the step's tokens, or the
places in the batch, are taken; other prompts' blocks had to be hashed; somebody was preempted in this step.
"""

SequenceEvent = Literal["prefix", "leader", "pending", "preempted", "ended"]
"""What happens to one sequence: it waits for a prefix that another computes, for the prompt of its request's first
sample, for a token that is in flight; it is preempted; it has ended.
"""


@dataclass(slots=True)
class TracedStep:
    """A step. Times are nanoseconds of `time.monotonic_ns`.

    Attributes:
        done: When what it computed was taken in; 0 until then.
        rows: int64, for each row the number of its sequence and how many tokens it computes.
        obstacle, head, priority: Why no more were admitted; the number and the priority of who would have been next,
            -1 and 0 if nobody waited.
    """

    planned: int
    done: int
    rows: bytes
    obstacle: WaitReason
    head: int
    priority: int


@dataclass(slots=True)
class TracedEvent:
    """What happened to a sequence."""

    at: int
    number: int
    what: SequenceEvent


@dataclass(slots=True)
class TracedSequence:
    """Who a sequence is.

    Attributes:
        number: Unique in the engine.
        index: Which of the request's samples.
        ended: When; 0 until then.
    """

    number: int
    request_id: str
    index: int
    owner: str
    priority: int
    num_prompt_tokens: int
    began: int
    ended: int = 0


@dataclass(slots=True)
class Trace:
    """What was traced in the last seconds, in order of time; of the sequences, those that were there then."""

    now: int
    steps: list[TracedStep] = field(default_factory=list)
    moments: list[TracedEvent] = field(default_factory=list)
    sequences: list[TracedSequence] = field(default_factory=list)


Entry = TracedStep | TracedEvent | TracedSequence


class StepTrace:
    """What the last steps were and what sequences waited for, in a ring of bounded size.

    Attributes:
        num_bytes: About what its entries take; sequences that live come to it.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.num_bytes = 0
        self._max_bytes, self._clock = max_bytes, clock
        # Each with its size and the time when it was whole.
        self._entries: deque[tuple[int, int, Entry]] = deque()
        self._live: dict[int, TracedSequence] = {}
        self._in_flight: deque[TracedStep] = deque()

    def begin(self, sequence: Sequence) -> None:
        """Notes that a sequence has come."""
        request = sequence.request
        number, at = sequence.arrival, self._clock()
        self._live[number] = TracedSequence(
            number,
            request.request_id,
            sequence.index,
            request.owner,
            request.priority,
            len(request.prompt_token_ids),
            at,
        )

    def note(self, sequence: Sequence, what: SequenceEvent) -> None:
        """Notes what happens to a sequence."""
        at = self._clock()
        if what != "ended":
            self._append(at, 150, TracedEvent(at, sequence.arrival, what))
            return
        traced = self._live.pop(sequence.arrival, None)
        if traced is not None:
            traced.ended = at
            self._append(at, 300 + len(traced.request_id) + len(traced.owner), traced)

    def plan(self, rows: Mapping[Sequence, int], obstacle: WaitReason, head: Sequence | None) -> None:
        """Notes a step that is about to run."""
        numbers = array("q")
        for sequence, num_tokens in rows.items():
            numbers.append(sequence.arrival)
            numbers.append(num_tokens)
        why: tuple[WaitReason, int, int] = ("", -1, 0)
        if head is not None:
            why = obstacle, head.arrival, head.priority
        step = TracedStep(self._clock(), 0, numbers.tobytes(), *why)
        self._in_flight.append(step)
        self._append(step.planned, 200 + len(step.rows), step)

    def done(self) -> None:
        """Notes that the oldest step in flight is taken in."""
        if self._in_flight:
            self._in_flight.popleft().done = self._clock()

    def reset(self) -> None:
        """Forgets that steps are in flight."""
        self._in_flight.clear()

    def last(self, seconds: float) -> Trace:
        """What there is of the last seconds."""
        trace = Trace(self._clock())
        since = trace.now - int(seconds * 1e9)
        for at, _, entry in self._entries:
            if at < since:
                continue
            match entry:
                case TracedStep():
                    trace.steps.append(entry)
                case TracedEvent():
                    trace.moments.append(entry)
                case TracedSequence():
                    trace.sequences.append(entry)
        trace.sequences += self._live.values()
        return trace

    def _append(self, at: int, size: int, entry: Entry) -> None:
        self._entries.append((at, size, entry))
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= self._entries.popleft()[1]
