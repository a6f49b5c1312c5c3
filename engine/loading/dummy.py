"""A model without its weights: what `--load-format dummy` needs of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.config import LoadFormat
from engine.errors import CheckpointError
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.loading.file_kinds import is_gguf
from engine.loading.json_file import read_json
from engine.loading.safetensors import text_config
from engine.parallel.shards import WHOLE, Slices
from engine.quant.weight import Weight
from engine.quant_spec import SchemeSpec


class DummyCheckpoint:
    """The configuration of a GGUF file or of a directory that may hold nothing but a config.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir() or not is_gguf(path):
            directory = path if path.is_dir() else path.parent
            self.config = text_config(read_json(directory / "config.json", required=True))
            self.config.setdefault("tie_word_embeddings", False)
        else:
            self.config = open_checkpoint(path).config
        self.generation_config: dict[str, Any] = {}
        self.recommended_params: dict[str, Any] = {}

    def names(self) -> set[str]:
        return set() if self.config["tie_word_embeddings"] else {"lm_head.weight"}

    def other_names(self) -> set[str]:
        return set()

    def auto_schemes(self, modules: Iterable[str]) -> dict[str, SchemeSpec]:
        return {}

    @property
    def num_bytes_read(self) -> int:
        return 0

    def tensor(self, name: str, part: Slices = WHOLE, shape: tuple[int, ...] | None = None) -> Weight:
        raise CheckpointError(f"{self.path}: {name} was not loaded (load_format is dummy)")


def open_model(path: Path, load_format: LoadFormat) -> Checkpoint:
    """What an engine loads, or does without.

    Raises:
        CheckpointError: As `open_checkpoint`.
    """
    return DummyCheckpoint(path) if load_format == "dummy" else open_checkpoint(path)
