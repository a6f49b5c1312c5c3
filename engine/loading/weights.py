"""From a checkpoint to a model ready to run, through a cache of parsed weights that memory-maps."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import mmap
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from engine.cache_directory import cache_directory
from engine.errors import CheckpointError
from engine.kernels.checksum import checksum
from engine.loading.checkpoint import Checkpoint
from engine.loading.file_kinds import part_number
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.shapes import tensor_shape
from engine.parallel.shards import WHOLE, Slices
from engine.quant.block_weight import BlockWeight
from engine.quant.weight import CodebookWeight, GridWeight, Weight

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Part of every cache key; goes up when what is stored under a scheme's name changes."""


_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """Identifies a checkpoint's content: paths, sizes and modification times of its files, hashed."""
    path = checkpoint.path.resolve()
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in _FILES]
    else:
        files = [path, *sorted(path.parent.glob("*.json"))]
        if part_number(path) is not None:
            files += sorted(path.parent.glob("*-of-*.gguf"))
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        if file.is_file():
            status = file.stat()
            digest.update(f"{file}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_checked(checkpoint: Checkpoint, config: ModelConfig, name: str, part: Slices = WHOLE) -> Weight:
    """A tensor of the checkpoint, or a part of it; the whole has the shape that the model needs.

    Raises:
        CheckpointError: It is missing, damaged, of an unsupported type, or of another shape; or the part cuts groups
            that share a scale; or a number of it is infinite or not a number.
    """
    weight = checkpoint.tensor(name, part, tensor_shape(config, name))
    numbers = _floats_of(weight)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in numbers):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} holds numbers that are infinite or not numbers (NaN): every answer "
            "would be; take another copy of the model"
        )
    return weight


def _floats_of(weight: Weight) -> list[torch.Tensor]:
    """The numbers that a weight is made of, besides codes."""
    match weight:
        case torch.Tensor():
            return [weight]
        case GridWeight():
            return [part for part in (weight.scale, weight.minimum) if part is not None]
        case CodebookWeight():
            return [part for part in (weight.codebook, weight.scale) if part is not None]
        case BlockWeight():
            return [part for part in weight.parts.values() if part.is_floating_point()]


def load_weights(
    model: Decoder, checkpoint: Checkpoint, name: str, cache_dir: Path | None, device: torch.device
) -> None:
    """Fills the model, from the cache if an earlier start left its parsed weights there.

    Args:
        name: Of the quantization; part of the cache file's name.
        cache_dir: None for the default one.

    Raises:
        CheckpointError: As `read_checked`.
    """
    directory = (cache_dir or cache_directory()) / "weights"
    path = directory / f"{checkpoint_key(checkpoint)}-{name}-v{CACHE_FORMAT}.safetensors"
    # What one rank parses, all do: they quantize some weights together.
    found = _read(path, model)
    is_missing = torch.tensor([found is None], dtype=torch.int32, device=device)
    if model.group.largest(is_missing):
        names = tqdm(
            total=sum(1 for _ in model.buffers()), desc="Parsing weights", unit="tensor", leave=False
        )
        with names:

            def read(tensor_name: str, part: Slices) -> Weight:
                names.update()
                return read_checked(checkpoint, model.config, tensor_name, part)

            model.load(read)
        # The mapped file then backs the weights, and what parsing allocated is released.
        found = _read(path, model) if _save(model.state_dict(), path) else None
    tensors = model.state_dict() if found is None else found
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    model.bind()
    if device.type == "cpu" and found is not None:
        _release(path)


def _read(path: Path, model: Decoder) -> dict[str, torch.Tensor] | None:
    """What an earlier start left there of the model, mapped, if that is all of it, and is what was written.

    Whatever is wrong with the file (it was cut off, overwritten, or another version wrote it), the weights are parsed
    anew.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
            checksums = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != expected:
            return None
        damaged = [name for name, tensor in tensors.items() if checksums.get(name) != checksum(tensor)]
        reason = f"{damaged[0]} is not what was written" if damaged else ""
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
    if reason:
        logger.warning("%s: damaged (%s): the weights are parsed again", path, reason)
        return None
    return tensors


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


def _save(tensors: dict[str, torch.Tensor], path: Path) -> bool:
    """Writes beside the target and renames: another engine sees the whole file or none.

    Returns:
        False where it cannot be written: the next start parses the weights again.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
        os.close(handle)
        contiguous = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, temporary, {key: checksum(tensor) for key, tensor in contiguous.items()})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "parsed weights cannot be kept in %s (%s), and are parsed at each start; name a directory with space "
            "with --cache-dir",
            path.parent,
            str(error).split("\n")[0],
        )
        return False
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return True
