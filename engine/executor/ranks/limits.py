"""Limits: how long the processes of an engine may be silent, and how long a step may take."""

from __future__ import annotations

from dataclasses import dataclass

BEAT_SECONDS = 1.0
"""How often each process of an engine says that it lives."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long processes may be silent and steps may take, all in seconds.

    A process that is stuck as a whole is found by its silence. One that lives, and is stuck in a step of T tokens
    over W bytes of weights, is found after

        step + T * W / bytes_per_second,

    as if all weights were read again for each token, at a speed that everything that can serve a model exceeds many
    times: the limit is not to hurry anyone, and must let a step of half a minute pass.

    Seconds are those in which the process could have got on (`engine.process.ProcessClock`): on a busy machine they
    take longer.

    Attributes:
        start: Silence of a process that loads: imports alone take minutes where disks are slow, one that ends is seen
            at once.
        silence: Of one that runs steps.
        task: How long a step may go without a task of it being taken, where that can be seen: they take milliseconds.
        settle: How long a failure waits for its cause: where one rank has died, others fail in their exchanges with
            it, and may be heard first.
    """

    start: float = 300.0
    silence: float = 5.0
    task: float = 10.0
    step: float = 40.0
    bytes_per_second: float = 2.0**28
    settle: float = 1.0

    def of_step(self, num_tokens: int, num_bytes: int) -> float:
        """What a step of so many tokens over so many bytes of weights may take."""
        return self.step + num_tokens * num_bytes / self.bytes_per_second
