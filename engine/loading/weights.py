"""From a checkpoint to a model ready to run, through a cache of parsed weights that memory-maps."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from engine.cache_directory import cache_directory
from engine.errors import CheckpointError
from engine.kernels.checksum import checksum
from engine.kernels.cpu import LINE
from engine.loading.checkpoint import Checkpoint
from engine.loading.file_kinds import part_number
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.shapes import tensor_shape
from engine.parallel.shards import WHOLE, Slices
from engine.quant.block_weight import BlockWeight
from engine.quant.weight import CodebookWeight, GridWeight, LowRankWeight, RotatedWeight, Weight, is_finite

logger = logging.getLogger(__name__)

CACHE_FORMAT = 5
"""Part of every cache key; goes up when what is stored under a scheme's name changes."""

_STALE_SECONDS = 3600
"""A file that is half written for longer is that of a start which was killed."""

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""As safetensors names them."""

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
    if not all(map(is_finite, numbers)):
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
        case LowRankWeight():
            return _floats_of(weight.outer) + _floats_of(weight.inner)
        case RotatedWeight():
            return _floats_of(weight.grid)
        case BlockWeight():
            return [part for part in weight.parts.values() if part.is_floating_point()]


def load_weights(
    model: Decoder,
    checkpoint: Checkpoint,
    name: str,
    cache_dir: Path | None,
    device: torch.device,
    is_packed: bool,
) -> Thread | None:
    """Fills and binds the model, from the cache if an earlier start left its weights there.

    What the C kernels read lies in the file as they read it, so that the mapped file is all the memory that weights
    take; other devices bind what their schemes store. The first start does not wait for the file: a thread writes it.

    Args:
        name: Of the quantization; part of the cache file's name.
        cache_dir: None for the default one.
        is_packed: Whether all products are those of C.

    Returns:
        What writes the file, if this start does: a program that ends waits for it.

    Raises:
        CheckpointError: As `read_checked`.
    """
    directory = (cache_dir or cache_directory()) / "weights"
    form = "-packed" if is_packed else ""
    path = directory / f"{checkpoint_key(checkpoint)}-{name}{form}-v{CACHE_FORMAT}.safetensors"
    if is_packed:
        # On the meta device: it then says what the file must hold.
        model.bind()
    found = _read(path, model)
    # What one rank parses, all do: they quantize some weights together.
    is_missing = torch.tensor([found is None], dtype=torch.int32, device=device)
    if not model.group.largest(is_missing):
        assert found is not None
        model.load_state_dict({name: tensor.to(device) for name, tensor in found.items()}, assign=True)
        if not is_packed:
            model.bind()
        return None
    with tqdm(total=model.num_weights, desc="Parsing weights", unit="tensor", leave=False) as progress:

        def read(tensor_name: str, part: Slices) -> Weight:
            progress.update()
            return read_checked(checkpoint, model.config, tensor_name, part)

        model.load(read, binds=is_packed)
    writer = _start_writing(model.state_dict(), path)
    if not is_packed:
        # Copies, also on the CPU: what a scheme stores as it is read would be the checkpoint's own file, mapped.
        tensors = {name: tensor.to(device, copy=True) for name, tensor in model.state_dict().items()}
        model.load_state_dict(tensors, assign=True)
        model.bind()
    return writer


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


def _start_writing(tensors: dict[str, torch.Tensor], path: Path) -> Thread:
    """Has a thread write a file, beside what the engine goes on with: nothing changes the tensors any more."""
    # Here, since the C kernels belong to one thread.
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    thread = Thread(target=_save, args=(tensors, checksums, path), name="weights writer")
    thread.start()
    return thread


def _save(tensors: dict[str, torch.Tensor], checksums: dict[str, str], path: Path) -> None:
    """Writes beside the target and renames: another engine sees the whole file or none.

    Where it cannot be written, the next start parses the weights again.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for partial in path.parent.glob(f"{path.stem}*.partial"):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                partial.unlink(missing_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            _write(tensors, checksums, file)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning(
            "parsed weights cannot be kept in %s (%s), and are parsed at each start; name a directory with space "
            "with --cache-dir",
            path.parent,
            error,
        )
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _write(tensors: dict[str, torch.Tensor], metadata: dict[str, str], file: BinaryIO) -> None:
    """Writes a file of safetensors' format, a tensor after the other, without a copy of them all.

    What consists of whole lines of memory comes first, so that it starts with one where the file is mapped; of the
    rest, the larger types.
    """

    def order(item: tuple[str, torch.Tensor]) -> tuple[bool, int, str]:
        name, tensor = item
        return tensor.nbytes % LINE != 0, -tensor.itemsize, name

    header: dict[str, Any] = {"__metadata__": metadata}
    position, ordered = 0, sorted(tensors.items(), key=order)
    for name, tensor in ordered:
        end = position + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
