"""Directories with quantized weights, packed with Python's integers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.quant.weight import Weight

MODULE = "model.layers.0.mlp.down_proj"


def write_directory(
    path: Path, tensors: dict[str, torch.Tensor], quantization: object, **changes: Any
) -> Checkpoint:
    """Writes and opens a directory that holds these tensors, its config.json with these changes."""
    path.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": quantization, **changes}
    (path / "config.json").write_text(json.dumps(config))
    # Copies, as modules may share tensors.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(copies, path / "model.safetensors")
    return open_checkpoint(path)


def read_module(path: Path, parts: dict[str, torch.Tensor], quantization: object) -> Weight:
    """The weight of a directory's only module."""
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    return write_directory(path, tensors, quantization).tensor(f"{MODULE}.weight")


def pack_rows(codes: list[list[int]], bits: int) -> list[list[int]]:
    """Words of 32 bits along the rows of codes, the first code in the lowest bits."""
    per_word = 32 // bits
    return [
        [
            sum(code << (bits * place) for place, code in enumerate(row[start : start + per_word]))
            for start in range(0, len(row), per_word)
        ]
        for row in codes
    ]


def to_tensor(words: list[list[int]]) -> torch.Tensor:
    """Unsigned words as int32 of the same bits."""
    return torch.tensor([[word - (1 << 32) if word >> 31 else word for word in row] for row in words]).int()


def transpose(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def random_codes(rows: int, columns: int, bits: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    codes: list[list[int]] = torch.randint(0, 1 << bits, (rows, columns), generator=generator).tolist()
    return codes


def random_scales(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.rand(rows, columns, generator=generator) * 0.01 + 1e-4).to(dtype)


def expected_weight(
    codes: list[list[int]], zeros: list[list[int]], scales: torch.Tensor, group_of: Callable[[int], int]
) -> torch.Tensor:
    """(code - zero) * scale, element by element in Python's floats, [N, K] float64."""
    return torch.tensor(
        [
            [(code - zeros[n][group_of(k)]) * float(scales[n, group_of(k)]) for k, code in enumerate(row)]
            for n, row in enumerate(codes)
        ],
        dtype=torch.float64,
    )


def assert_refused(read: Callable[[], Any], *words: str) -> None:
    """The error is one line that holds these words."""
    with pytest.raises(CheckpointError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
