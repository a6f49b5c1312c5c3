"""Checkpoint: a model's configuration and weights, however they are written on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from engine.loading.file_kinds import is_gguf
from engine.loading.safetensors import DirectoryCheckpoint
from engine.parallel.shards import WHOLE, Slices
from engine.quant.weight import Weight
from engine.quant_spec import SchemeSpec


class Checkpoint(Protocol):
    """A model on disk, in Hugging Face's names and conventions.

    Attributes:
        path: The GGUF file or the directory.
        config: The keys of config.json; a multimodal model's text part.
    """

    path: Path
    config: dict[str, Any]

    @property
    def generation_config(self) -> dict[str, Any]:
        """The keys of generation_config.json; empty if there is none. A GGUF file is searched for its end tokens."""
        ...

    @property
    def recommended_params(self) -> dict[str, Any]:
        """The keys of `generation_config` where it may recommend sampling parameters; a GGUF file has none."""
        ...

    def names(self) -> set[str]:
        """The tensors' names, like "model.layers.0.self_attn.q_proj.weight"."""
        ...

    def other_names(self) -> set[str]:
        """The names, as stored, of tensors beside the text model's."""
        ...

    def auto_schemes(self, modules: Iterable[str]) -> dict[str, SchemeSpec]:
        """What `--quant auto` makes of some modules; empty if nothing is quantized."""
        ...

    @property
    def num_bytes_read(self) -> int:
        """Bytes of tensors that were read so far, as they are stored."""
        ...

    def tensor(self, name: str, part: Slices = WHOLE, shape: tuple[int, ...] | None = None) -> Weight:
        """Read one tensor: as stored if float, on its grid if the file's own grid is kept (GGUF Q4_1, Q8_0,
        and what `engine.loading.formats` says).

        Of a part only the part is read, but for: columns that cut blocks of a GGUF file, of which whole blocks are
        read, or, of a grid, whole rows; and modules that are quantized in a directory, which are read whole, or, in
        this engine's own format, in whole rows.

        Args:
            shape: That the whole tensor must have; None: any.

        Raises:
            CheckpointError: The tensor is missing, damaged, of an unsupported type or of another shape, or the part
                cuts groups that share a scale.
        """
        ...


def stored_schemes(checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, SchemeSpec]:
    """How the quantized ones of some modules are stored; empty for a checkpoint of floats.

    GGUF files are such: their blocks are a way to store a model of floats, whatever `--quant` makes of it.
    """
    return checkpoint.stored_schemes(modules) if isinstance(checkpoint, DirectoryCheckpoint) else {}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, a model directory, or one of its files of weights; reads the configuration, no weights.

    Raises:
        CheckpointError: The checkpoint is damaged, incomplete or of an unsupported kind.
    """
    if path.is_dir() or not is_gguf(path):
        return DirectoryCheckpoint(path)
    # Directories load without the gguf package.
    from engine.loading.gguf.checkpoint import GGUFCheckpoint

    return GGUFCheckpoint(path)
