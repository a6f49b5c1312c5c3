"""Parts of weights: what a rank reads, and keeps, of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.kernels.rotation import ROTATION_BLOCK
from engine.parallel.shards import Slices
from engine.quant.block_weight import BlockWeight
from engine.quant.weight import CodebookWeight, GridWeight, LowRankWeight, RotatedWeight, Weight


def check_shape(path: Path, name: str, found: Sequence[int], expected: Sequence[int] | None) -> None:
    """
    Args:
        path: Of the checkpoint.
        found: The shape of the whole tensor.
        expected: None: any.

    Raises:
        CheckpointError: They differ.
    """
    if expected is not None and list(found) != list(expected):
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected shape {list(expected)}, found {list(found)}"
        )


def take_slices(weight: Weight, part: Slices, name: str) -> Weight:
    """The rows and columns of a tensor, on their grid.

    Args:
        name: Of the tensor, for the error.

    Raises:
        CheckpointError: The columns cut a group that shares a scale, or is rotated together.
    """
    if isinstance(weight, torch.Tensor):
        taken = weight if part.rows is None else weight[part.rows]
        return taken if part.columns is None else taken[:, part.columns]
    rows = part.rows or slice(None)
    columns = part.columns or slice(0, weight.shape[1])
    if isinstance(weight, LowRankWeight):
        outer = take_slices(weight.outer, Slices(part.rows), name)
        inner = take_slices(weight.inner, Slices(None, part.columns), name)
        assert isinstance(outer, torch.Tensor | GridWeight | CodebookWeight)
        assert isinstance(inner, torch.Tensor | GridWeight | CodebookWeight)
        return LowRankWeight(outer, inner)
    if isinstance(weight, BlockWeight):
        if weight.is_cut_by(columns):
            # As floats: these blocks are longer than what ranks share a row by.
            return take_slices(weight.dequantize(), part, name)
        _check_columns(columns, weight.step, weight.in_features, name)
        return weight.cut(rows, columns)
    if isinstance(weight, RotatedWeight):
        _check_columns(columns, ROTATION_BLOCK, weight.shape[1], name, "are rotated together")
        grid = take_slices(weight.grid, part, name)
        assert isinstance(grid, GridWeight)
        return RotatedWeight(grid)
    groups = _groups(weight, columns, name)
    scale = None if weight.scale is None else weight.scale[rows, groups]
    codes = weight.codes[rows, columns]
    size = min(weight.group_size, codes.shape[1])
    if isinstance(weight, CodebookWeight):
        codebook = weight.codebook if len(weight.codebook) == 1 else weight.codebook[rows]
        return CodebookWeight(codes, codebook, scale, size)
    assert scale is not None
    minimum = None if weight.minimum is None else weight.minimum[rows, groups]
    return GridWeight(codes, scale, minimum, size)


def _groups(weight: GridWeight | CodebookWeight, columns: slice, name: str) -> slice:
    """The groups of columns along K."""
    size, in_features = weight.group_size, weight.shape[1]
    if size >= in_features:
        return slice(None)  # whole rows share
    _check_columns(columns, size, in_features, name)
    return slice(columns.start // size, -(-columns.stop // size))


def _check_columns(
    columns: slice, size: int, in_features: int, name: str, bond: str = "share a scale"
) -> None:
    if columns.start % size or (columns.stop % size and columns.stop != in_features):
        raise CheckpointError(
            f"{name}: columns {columns.start} to {columns.stop - 1} cut groups of {size} that {bond}; "
            "leave --no-exact-reduce out, or choose another --tensor-parallel-size"
        )
