"""Checkpoint: a model's configuration and weights, however they are written on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from engine.errors import CheckpointError
from engine.loading.formats import QUANTIZATION_KEYS
from engine.loading.safetensors import DirectoryCheckpoint
from engine.quant.weight import GridWeight, Weight


class Checkpoint(Protocol):
    """A model on disk, in Hugging Face's names and conventions.

    Attributes:
        path: The GGUF file or the directory.
        config: The keys of config.json; a multimodal model's text part.
        generation_config: The keys of generation_config.json; empty if there is none.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def names(self) -> set[str]:
        """The tensors' names, like "model.layers.0.self_attn.q_proj.weight"."""
        ...

    def tensor(self, name: str) -> Weight:
        """Read one tensor: as stored if float, on its grid if the file's own grid is kept (GGUF Q4_1, Q8_0,
        and what `engine.loading.formats` says).

        Raises:
            CheckpointError: The tensor is missing, damaged or of an unsupported type.
        """
        ...


@dataclass(frozen=True, slots=True)
class StoredGrid:
    """How a quantized checkpoint's linear layers are stored.

    Attributes:
        quant: "int8" (a scale a row) or "int4", as for `--quant`.
        group_size: Of int4; 0 is whole rows.
    """

    quant: Literal["int8", "int4"]
    group_size: int


def stored_grid(checkpoint: Checkpoint) -> StoredGrid | None:
    """The grid of a quantized checkpoint; None if its weights are floats or on one that no scheme keeps.

    GGUF files are None: their blocks are a way to store a model of floats, whatever `--quant` makes of it.
    """
    if not any(checkpoint.config.get(key) for key in QUANTIZATION_KEYS):
        return None
    weight = checkpoint.tensor("model.layers.0.mlp.down_proj.weight")
    if not isinstance(weight, GridWeight):
        return None
    is_whole_row = weight.scale.shape[1] == 1
    if weight.codes.dtype == torch.int8:
        return StoredGrid("int8", 0) if is_whole_row else None
    if is_whole_row:
        return StoredGrid("int4", 0)
    return StoredGrid("int4", weight.group_size) if weight.group_size % 32 == 0 else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a model directory; reads the configuration, no weights.

    Raises:
        CheckpointError: The checkpoint is damaged, incomplete or of an unsupported kind.
    """
    if path.is_dir():
        return DirectoryCheckpoint(path)
    if path.suffix == ".gguf":
        # Directories load without the gguf package.
        from engine.loading.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    raise CheckpointError(f"{path}: neither a model directory nor a .gguf file")
