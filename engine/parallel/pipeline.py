"""Pipeline: the stages that hold a model's layers one after the other, and what goes from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.errors import ConfigError
from engine.kernels import cpu
from engine.parallel.group import Backend, TensorGroup
from engine.parallel.shards import Shard
from engine.parallel.waiting import Wait, WaitRecord


@dataclass(slots=True)
class Pipeline:
    """A rank's stage.

    Attributes:
        stage: Which, 0 … size - 1.
        backend: Of the ranks with the same share of each stage, in the stages' order; None for one stage, and on the
            meta device.
        shard: Of the layers of its stage, as the same rank of other stages has it of theirs.
        record: Says for whom this rank waits.
        num_bytes: What this rank has sent.
    """

    stage: int = 0
    size: int = 1
    backend: Backend | None = None
    shard: Shard = field(default_factory=Shard)
    record: WaitRecord = field(default_factory=WaitRecord)
    num_bytes: int = 0
    _sent: tuple[object, torch.Tensor] | None = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.size - 1

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks of the stages before and after that this one exchanges with, of all of the engine."""
        stages = (self.stage - 1, self.stage + 1)
        return tuple(self._rank_of(stage) for stage in stages if 0 <= stage < self.size)

    def layers(self, num_layers: int) -> range:
        """The layers of this stage. The first stages have one more where they do not divide: the last has the head.

        Raises:
            ConfigError: There are fewer layers than stages.
        """
        if num_layers < self.size:
            raise ConfigError(
                f"pipeline_parallel_size: {self.size} stages for {num_layers} layers; at most {num_layers}"
            )
        each, more = divmod(num_layers, self.size)
        first = self.stage * each + min(self.stage, more)
        return range(first, first + each + (self.stage < more))

    def receive(self, like: torch.Tensor, num_tokens: int, features: int, dtype: torch.dtype) -> torch.Tensor:
        """Hidden states [num_tokens, features] of the stage before, on the device of `like`."""
        if like.device.type == "cpu":
            x = cpu.empty("received", num_tokens, features, dtype=dtype)
        else:
            x = torch.empty(num_tokens, features, dtype=dtype, device=like.device)
        cpu.call(lambda rows: self._receive(x[:rows]), num_tokens)
        return x

    def send(self, x: torch.Tensor) -> None:
        """Hands hidden states to the next stage; does not wait until that takes them."""
        cpu.call(lambda rows: self._send(x[:rows]), x.shape[0])

    def _receive(self, x: torch.Tensor) -> None:
        assert self.backend is not None
        with self.record.waiting((self._rank_of(self.stage - 1),), "receive"):
            self.backend.recv([x], self.stage - 1, 0).wait()

    def _send(self, x: torch.Tensor) -> None:
        assert self.backend is not None
        with self.record.waiting((self._rank_of(self.stage + 1),), "send"):
            if self._sent is not None:
                self._sent[0].wait()  # type: ignore[attr-defined]
            copy = x.clone()
            self._sent = self.backend.send([copy], self.stage + 1, 0), copy
        self.num_bytes += copy.nbytes

    def _rank_of(self, stage: int) -> int:
        return stage * self.shard.size + self.shard.rank


def waiting_for_device(group: TensorGroup, pipeline: Pipeline) -> Wait:
    """A context in which a rank waits for its device, and so for all with whom that exchanges."""
    return group.record.waiting((*group.others, *pipeline.neighbours), "device")
