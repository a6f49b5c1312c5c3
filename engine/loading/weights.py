"""From a checkpoint to a model ready to run, through a cache of parsed weights that memory-maps."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
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
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.shapes import tensor_shape
from engine.parallel.shards import WHOLE, Slices
from engine.quant.weight import Weight

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


def read_checked(checkpoint: Checkpoint, config: ModelConfig, name: str, part: Slices = WHOLE) -> Weight:
    """A tensor of the checkpoint, or a part of it; the whole has the shape that the model needs.

    Raises:
        CheckpointError: It is missing, damaged, of an unsupported type, or of another shape; or the part cuts groups
            that share a scale.
    """
    return checkpoint.tensor(name, part, tensor_shape(config, name))


def load_weights(
    model: Decoder, checkpoint: Checkpoint, name: str, cache_dir: Path | None, device: torch.device
) -> None:
    """Fills the model, from the cache if an earlier start left its parsed weights there.

    Args:
        name: Of the quantization; part of the cache file's name.
        cache_dir: None for the default one.

    Raises:
        CheckpointError: As `read_checked`.
        ConfigError: The cache cannot be written.
    """
    directory = (cache_dir or cache_directory()) / "weights"
    path = directory / f"{checkpoint_key(checkpoint)}-{name}-v{CACHE_FORMAT}.safetensors"
    # What one rank parses, all do: they quantize some weights together.
    is_missing = torch.tensor([not _is_whole(path, model)], dtype=torch.int32, device=device)
    if model.group.largest(is_missing):
        names = tqdm(
            total=sum(1 for _ in model.buffers()), desc="Parsing weights", unit="tensor", leave=False
        )
        with names:

            def read(tensor_name: str, part: Slices) -> Weight:
                names.update()
                return read_checked(checkpoint, model.config, tensor_name, part)

            model.load(read)
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
    if device.type == "cpu":
        _release(path)


def _is_whole(path: Path, model: Decoder) -> bool:
    """Whether an earlier start left every tensor of the model there; one of another version may know others."""
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return set(file.keys()) == set(model.state_dict())


def _release(path: Path) -> None:
    """Takes a mapped file's pages, and what the allocator keeps for later, out of this process's memory.

    The products have packed copies; the table and the norms' weights, which stay mapped because of nothing else, keep
    the whole file mapped with them. What is read again comes back page by page. Nothing may have written to the
    pages: what was written would be lost.
    """
    functions = ctypes.CDLL(None)
    if not hasattr(functions, "malloc_trim"):
        return  # not glibc, whose constants these are
    functions.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, file = line.split(maxsplit=5)
        if file == str(path.resolve()):
            start, end = (int(address, 16) for address in addresses.split("-"))
            functions.madvise(start, end - start, mmap.MADV_DONTNEED)
    functions.malloc_trim(0)


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
