"""From a checkpoint to a model ready to run, through a cache of parsed weights that memory-maps."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from engine.cache_directory import cache_directory
from engine.errors import ConfigError
from engine.loading.checkpoint import Checkpoint
from engine.models.decoder import Decoder

CACHE_FORMAT = 1
"""Part of every cache key; goes up when what is stored under a scheme's name changes."""


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """Identifies a checkpoint's content: paths, sizes and modification times of its files, hashed."""
    path = checkpoint.path.resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        if file.suffix in (".gguf", ".safetensors", ".bin", ".json"):
            status = file.stat()
            digest.update(f"{file}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def load_weights(
    model: Decoder, checkpoint: Checkpoint, name: str, cache_dir: Path | None, device: torch.device
) -> None:
    """Fills the model, from the cache if an earlier start left its parsed weights there.

    Args:
        name: Of the quantization; part of the cache file's name.
        cache_dir: None for the default one.
    """
    directory = (cache_dir or cache_directory()) / "weights"
    path = directory / f"{checkpoint_key(checkpoint)}-{name}-v{CACHE_FORMAT}.safetensors"
    if not path.exists():
        names = tqdm(
            total=sum(1 for _ in model.buffers()), desc="Parsing weights", unit="tensor", leave=False
        )
        with names:

            def read(tensor_name: str) -> object:
                names.update()
                return checkpoint.tensor(tensor_name)

            model.load(read)  # type: ignore[arg-type]
        try:
            _save(model.state_dict(), path)
        except OSError as error:
            raise ConfigError(
                f"cache_dir: parsed weights cannot be written to {directory} ({error}); "
                "name another directory with --cache-dir"
            ) from error
    # Also after parsing: the mapped file then backs the weights, and what parsing allocated is released.
    with safe_open(path, framework="pt", device=str(device)) as file:
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, assign=True)  # noqa: SIM118
    model.bind()


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes beside the target and renames: another engine sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    os.close(handle)
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
