"""A compressed checkpoint written once more as floats: for programs that do not read how it is stored."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from pathlib import Path

import torch

from engine.compression.record import RECORD
from engine.compression.writing import of_float16, write_directory, write_shard
from engine.loading.checkpoint import Checkpoint
from engine.loading.formats import QUANTIZATION_KEYS
from engine.quant.weight import to_float

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def write_dense(checkpoint: Checkpoint, directory: Path) -> None:
    """Writes the numbers that a directory's codes stand for, rounded to float16, a layer at a time, zeros as zeros.

    Args:
        checkpoint: A directory that this engine has compressed.
        directory: There, perhaps with the first files of an interrupted run.
    """
    shards: dict[str, list[str]] = defaultdict(list)
    for name in sorted(checkpoint.names()):
        match = _LAYER.match(name)
        part = "rest" if match is None else f"layer-{int(match[1]):05d}"
        shards[f"model-{part}.safetensors"].append(name)
    for file, names in shards.items():
        if not (directory / file).exists():
            floats = {name: to_float(checkpoint.tensor(name)).to(torch.float16) for name in names}
            write_shard(floats, directory / file)
    shutil.copy(checkpoint.path / RECORD, directory)
    config = {key: value for key, value in checkpoint.config.items() if key not in QUANTIZATION_KEYS}
    write_directory(directory, checkpoint, of_float16(config), shards)
