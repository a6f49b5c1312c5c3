"""Checkpoint: a model's configuration and weights, however they are written on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from engine.errors import CheckpointError
from engine.loading.safetensors import DirectoryCheckpoint
from engine.quant.weight import Weight


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
        """Read one tensor: as stored if float, on its grid if the file's own grid is kept (GGUF Q4_1, Q8_0).

        Raises:
            CheckpointError: The tensor is missing, damaged or of an unsupported type.
        """
        ...


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
