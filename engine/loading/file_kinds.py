"""What a file is, by its first bytes: names say little (an Ollama blob has no suffix)."""

from __future__ import annotations

import re
import stat
import zipfile
from pathlib import Path

from engine.errors import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
"""Suffixes of files that hold a model's weights, with its config.json beside them."""

_GGUF_MAGIC = b"GGUF"
PART_NAME = re.compile(r"-(\d{5})-of-\d{5}\.gguf$", re.IGNORECASE)
"""The end of the name of a part of a GGUF model."""

# Programs and graphs of other systems: they hold no weights that a name could find.
_FOREIGN_SUFFIXES = {
    ".onnx": "an ONNX graph",
    ".tflite": "a TFLite model",
    ".pb": "a TensorFlow SavedModel",
    ".h5": "Keras weights",
    ".keras": "a Keras model",
    ".msgpack": "Flax weights",
    ".mlmodel": "a Core ML model",
    ".engine": "a TensorRT engine",
    ".plan": "a TensorRT engine",
    ".nemo": "a NeMo archive",
    ".llamafile": "a llamafile",
}
_WHAT_LOADS = "a directory of transformers with safetensors, or a GGUF file, is what loads"


def check_regular(file: Path) -> None:
    """Refuses what would block or never end: devices, pipes, sockets, directories.

    Raises:
        CheckpointError: It is there, and no regular file.
    """
    try:
        mode = file.stat().st_mode
    except OSError:
        return  # whoever opens it says so
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{file}: expected a regular file")


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF does, or is called so: a damaged one is GGUF, too.

    Raises:
        CheckpointError: It cannot be read, or is no regular file.
    """
    check_regular(file)
    return file.suffix.lower() == ".gguf" or _first_bytes(file, len(_GGUF_MAGIC)) == _GGUF_MAGIC


def part_number(file: Path) -> int | None:
    """Which part of a GGUF model a file is, by its name, from 1 on; None if it is a whole one."""
    match = PART_NAME.search(file.name)
    return None if match is None else int(match[1])


def foreign_kind(path: Path) -> str | None:
    """What another system's model a path is, in words; None if it is none that is known here."""
    if path.is_dir():
        found = [name for name in sorted(path.iterdir()) if name.suffix.lower() in _FOREIGN_SUFFIXES]
        return _FOREIGN_SUFFIXES[found[0].suffix.lower()] if found else None
    if path.suffix.lower() in _FOREIGN_SUFFIXES:
        return _FOREIGN_SUFFIXES[path.suffix.lower()]
    if _first_bytes(path, 8)[4:] == b"TFL3":
        return "a TFLite model"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch.jit.save writes the program beside the tensors.
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                return "a TorchScript program"
    return None


def foreign_error(path: Path, kind: str) -> CheckpointError:
    """That a path is another system's model."""
    return CheckpointError(f"{path}: {kind}, which does not load; {_WHAT_LOADS}")


def _first_bytes(file: Path, count: int) -> bytes:
    check_regular(file)
    try:
        with file.open("rb") as opened:
            return opened.read(count)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
