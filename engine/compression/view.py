"""A checkpoint seen in another way: rotated, or without some of its layers, channels or heads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from engine.errors import CheckpointError
from engine.loading.checkpoint import Checkpoint
from engine.loading.slices import check_shape, take_slices
from engine.parallel.shards import WHOLE, Slices
from engine.quant.weight import Weight
from engine.quant_spec import SchemeSpec


class CheckpointView:
    """See `engine.loading.checkpoint.Checkpoint`.

    Args:
        config: The keys of config.json that are not the checkpoint's.
        names: The tensors that there are.
        read: A whole tensor, by its name here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: dict[str, Any],
        names: Collection[str],
        read: Callable[[str], Weight],
    ) -> None:
        self._checkpoint, self._names, self._read = checkpoint, set(names), read
        self.path = checkpoint.path
        self.generation_config = checkpoint.generation_config
        self.recommended_params = checkpoint.recommended_params
        self.config: dict[str, Any] = checkpoint.config | config

    def names(self) -> set[str]:
        return self._names

    def other_names(self) -> set[str]:
        return set()

    def auto_schemes(self, modules: Iterable[str]) -> dict[str, SchemeSpec]:
        return {}

    @property
    def num_bytes_read(self) -> int:
        return self._checkpoint.num_bytes_read

    def tensor(self, name: str, part: Slices = WHOLE, shape: tuple[int, ...] | None = None) -> Weight:
        if name not in self._names:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing, or was left out")
        weight = self._read(name)
        check_shape(self.path, name, weight.shape, shape)
        return take_slices(weight, part, name)
