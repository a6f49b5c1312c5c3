"""Matrices of which each four along K have at most two elements that are not zero."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def prune_fours(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] → the same with the two smallest of each four along K set to zero."""
    fours = weight.unflatten(1, (-1, 4))
    smallest = fours.abs().topk(2, dim=2, largest=False).indices
    return fours.scatter(2, smallest, 0.0).flatten(1)


def sparse_integers(rows: int, columns: int, bits: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, columns] int8 of all codes that so many bits have; some fours have fewer than two, or none."""
    most = 1 << (bits - 1)
    integers = torch.randint(-most, most, (rows, columns), generator=generator).float()
    # Distinct sizes, so that any two of a four are kept.
    order = torch.rand(rows, columns, generator=generator)
    kept = prune_fours(order) != 0
    thinned = torch.rand(rows, columns, generator=generator) < 0.8
    return (integers * kept * thinned).to(torch.int8)


def prune_checkpoint(path: Path) -> None:
    """Prunes the projections of a checkpoint's layers in place."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = prune_fours(tensor)
    save_file(tensors, file, metadata={"format": "pt"})
