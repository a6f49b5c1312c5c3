"""StepMeter: what a rank took and handed over, beside what was planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.config import format_bytes
from engine.executor.memory import MemoryPlan
from engine.parallel.exchanges import step_bytes
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline

METERED_STEPS = 100
"""After so many steps a rank says what it has exchanged and what it holds."""


class StepMeter:
    """Measures what a rank was planned to take: once it is loaded, and once more after METERED_STEPS steps.

    Args:
        plan: Of a path that counts what it exchanges: CUDA graphs replay exchanges without counting them.
        base_bytes: What the process held before the model was loaded.
        say: Takes the measurement in words.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        group: TensorGroup,
        pipeline: Pipeline,
        base_bytes: int,
        say: Callable[[str], None],
    ) -> None:
        assert plan.exchanges is not None
        self._plan, self._exchanges, self._group, self._pipeline = plan, plan.exchanges, group, pipeline
        self._base_bytes, self._say = base_bytes, say
        self._num_steps, self._planned = 0, 0
        say(f"{self._exchanges.rank} loaded: {self._held}")

    def note(self, num_tokens: int, num_draws: int) -> None:
        """Counts a step of so many tokens, of which so many draw, that has run."""
        self._num_steps += 1
        if self._num_steps > METERED_STEPS:
            return
        self._planned += sum(step_bytes(self._exchanges.exchanges, num_tokens, num_draws).values())
        if self._num_steps == METERED_STEPS:
            self._say(str(self))

    @property
    def num_bytes(self) -> int:
        """Bytes that were handed over since the start."""
        return sum(self._group.num_bytes.values()) + self._pipeline.num_bytes

    def __str__(self) -> str:
        return (
            f"{self._exchanges.rank} measured: {self._num_steps} steps handed over {format_bytes(self.num_bytes)}, "
            f"planned {format_bytes(self._planned)}; {self._held}"
        )

    @property
    def _held(self) -> str:
        plan, held = self._plan, private_bytes() - self._base_bytes
        return (
            f"the process holds {format_bytes(max(0, held))} more than before, planned "
            f"{format_bytes(plan.weights + plan.activations + plan.kv_cache)} with a full cache"
        )


def private_bytes(process: int | str = "self") -> int:
    """Memory of a process that no other has mapped; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
