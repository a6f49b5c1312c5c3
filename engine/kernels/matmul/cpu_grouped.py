"""Products on a CPU in groups along K: of integer weights, of the activations, or of both.

    w[n, k] = v[n, k] * scale[n, g] + minimum[n, g]             v: whole numbers; no minimum where a grid has none

With one scale a token (and a second term for few elements, see `engine.kernels.quantize`):

    t(x) = Σ_g (float(Σ_{k in g} x[m, k] * v[n, k]) * scale[n, g] + float(Σ_{k in g} x[m, k]) * minimum[n, g])
    y[m, n] = (t(high) * 128 + t(low)) * s[m] + bias[n]

With a scale for each group of a token, as `engine.kernels.matmul.int8` computes it on a GPU:

    y[m, n] = Σ_g float(Σ_{k in g} code * v) * s[m, g] * scale[n, g] + bias[n]

The sums of a group are int32 and exact, every float operation rounds once, in the order written here, and groups are
added one after the other: y is equal to the bit for every number of tokens, tile, instruction set and body.

Weights of four, five or six bits lie in panels of as many, which become bytes: in registers for a few tokens, and for
many in panels that stay in the second-level cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels import cpu, quantize
from engine.kernels.cpu.signatures import Argument
from engine.kernels.embedding import multiplied
from engine.kernels.matmul.cpu_int8 import (
    ALIGNMENT,
    PANEL,
    look_up,
    pack_int8,
    pack_sparse,
    pad_rows,
    run_packing,
)
from engine.kernels.matmul.grouped_weight import GroupedWeight, GroupNumbers
from engine.kernels.matmul.sparse24 import SparseCodes
from engine.kernels.operands import (
    Activations,
    Format,
    GroupSize,
    Int8Activations,
    Int8Format,
    SparseInt8Activations,
    SparseInt8Format,
)
from engine.kernels.quantize import HIGH_STEPS, quantize_sparse, sparse_reference

GROUP_SIZES: tuple[GroupSize, ...] = (128, 64, 32)
"""What the products take of int8 weights. The exact sums of larger groups would not fit into a float's 24 bits."""

_BYTES, _NIBBLES, _TABLE, _FIVES, _SIXES, _SPARSE = 0, 2, 3, 4, 5, 6
"""Kinds of panels in kernels/cpu/group_tiles.h."""

_SIGNED = 128
"""What bytes are stored with too much, so that they are unsigned."""


def _numbers_in_panels(numbers: GroupNumbers) -> GroupNumbers:
    """The same as the C body reads it: [N / 16, groups, 16]."""
    return GroupNumbers(
        _in_panels(numbers.values), None if numbers.steps is None else _in_panels(numbers.steps)
    )


def _in_panels(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] % PANEL:
        x = F.pad(x, (0, 0, 0, -x.shape[0] % PANEL))
    return x.view(-1, PANEL, x.shape[1]).transpose(1, 2).contiguous()


def pack_nibbles_in_panels(codes: torch.Tensor) -> torch.Tensor:
    """[N, ceil(K / 2)] uint8 → panels [N / 16, padded K / 8, 64] uint8; kernels/cpu/group_tiles.h says how."""
    rows, num_bytes = codes.shape
    shape = (-(-rows // PANEL), -(-2 * num_bytes // ALIGNMENT) * ALIGNMENT // 8, 64)
    return run_packing(
        "pack_nibbles",
        shape,
        torch.get_num_threads(),
        codes=codes.contiguous(),
        rows=rows,
        num_bytes=num_bytes,
    )


def pack_bits_in_panels(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, K] uint8 of 5 or 6 bits → panels [N / 16, padded K * bits * 2] uint8; group_tiles.h says how."""
    rows, columns = codes.shape
    shape = (-(-rows // PANEL), -(-columns // ALIGNMENT) * ALIGNMENT * bits * PANEL // 8)
    return run_packing(
        "pack_bits",
        shape,
        torch.get_num_threads(),
        codes=codes.contiguous(),
        rows=rows,
        columns=columns,
        bits=bits,
    )


def quantize_groups(x: torch.Tensor, group_size: int) -> Int8Activations:
    """The C body of one term with groups: x [M, K] float32, K contiguous. Rows of codes are padded to 64."""
    num_tokens, in_features = x.shape
    stride = in_features + -in_features % ALIGNMENT
    codes = cpu.empty("quantize_groups", num_tokens, stride, dtype=torch.int8)
    scale = cpu.empty("quantize_groups", num_tokens, -(-in_features // group_size))
    cpu.run(
        "quantize_groups",
        num_tokens,
        x=x,
        x_stride=x.stride(0),
        size=in_features,
        group_size=group_size,
        codes=codes,
        stride=stride,
        scale=scale,
    )
    return Int8Activations(codes, None, scale, x.dtype)


class CpuGroupedMatmul(nn.Module):
    """The product with one weight.

    Args:
        weight: In groups of 32, 64 or 128 where activations have such.
        row_scale: [N] float32, where only activations have groups.
        bias: [N] float32.
        format: How the activations are quantized: with one scale a token, or as one term with the weight's groups.

    Attributes:
        format: That which the product takes ready-made; None where that are floats.
    """

    def __init__(
        self,
        weight: GroupedWeight,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        format: SparseInt8Format | Int8Format,
    ) -> None:
        super().__init__()
        assert isinstance(format, SparseInt8Format) or format == Int8Format(1, format.group_size)
        assert isinstance(format, SparseInt8Format) or format.group_size == weight.group_size
        assert (weight.scale is None) != (row_scale is None)
        self.out_features, self.in_features = weight.codes.shape[0], weight.in_features
        self._format = format
        self.format: Format = None
        self._constants: dict[str, int] = {}
        self._weight: GroupedWeight | None = None
        self._row_scale, self._bias = row_scale, bias
        if cpu.library() is None:
            self._weight = weight
            return
        if isinstance(format, SparseInt8Format):
            self.format = format
        codes, kind, offset, self._table = _pack(weight)
        scale = None if weight.scale is None else _numbers_in_panels(weight.scale)
        # Those of sparse codes follow from their scales.
        minimum = None if weight.masks is not None else weight.minimum
        minimum = None if minimum is None else _numbers_in_panels(minimum)
        self.register_buffer("weight", codes)
        self.register_buffer("group_scale", None if scale is None else scale.values)
        self.register_buffer("scale_steps", None if scale is None else scale.steps)
        self.register_buffer("minimum", None if minimum is None else minimum.values)
        self.register_buffer("minimum_steps", None if minimum is None else minimum.steps)
        self.register_buffer("scale", pad_rows(row_scale))
        self.register_buffer("bias", pad_rows(bias))
        self._constants = {
            "kind": kind,
            "offset": offset,
            "size": self.in_features,
            "group_size": weight.group_size,
            "block_size": weight.block_size or weight.group_size,
            "features": self.out_features,
        }

    def forward(self, x: Activations, output: torch.Tensor | None = None) -> torch.Tensor:
        """[M, K] floats, or the format's codes → [M, N] of their dtype.

        Args:
            output: Where the result goes, [M, N] float32, N contiguous; None: where there is room.
        """
        if self._weight is not None:
            assert isinstance(x, torch.Tensor)
            y = reference(x, self._format, self._weight, self._row_scale, self._bias)
            return y if output is None else output.copy_(y)
        codes: dict[str, Argument]
        if isinstance(self._format, Int8Format):
            assert isinstance(x, torch.Tensor)
            assert self._format.group_size is not None
            groups = quantize_groups(x, self._format.group_size)
            stride, token_scale = groups.high.shape[1], groups.scale
            num_tokens, codes = len(x), {"low": groups.high, "tokens": None, "quads": None, "stride": stride}
        else:
            if isinstance(x, torch.Tensor):
                x = quantize_sparse(x, self._format)
            assert isinstance(x, SparseInt8Activations)
            num_tokens, codes, token_scale = x.num_tokens, x.arguments(), None
        y = cpu.empty("grouped_matmul", num_tokens, self.out_features) if output is None else output
        cpu.run(
            "grouped_matmul",
            num_tokens,
            **codes,
            token_scale=token_scale,
            **self._buffers,
            table=self._table,
            **self._constants,
            output=y,
            output_stride=y.stride(0),
        )
        return y

    def rows(self, token_ids: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
        """See `engine.quant.scheme.TableMatmul`; of a weight with scales of its own groups."""
        assert self._row_scale is None
        if self._weight is not None:
            return multiplied(self._weight.rows(token_ids).dequantize().to(dtype), factor)
        tensors = {name: tensor for name, tensor in self._buffers.items() if name not in ("bias", "scale")}
        constants = {name: size for name, size in self._constants.items() if name not in ("size", "features")}
        return look_up(
            "weight_rows",
            token_ids,
            self.in_features,
            dtype,
            factor,
            table=self._table,
            **tensors,
            **constants,
        )


def _pack(weight: GroupedWeight) -> tuple[torch.Tensor, int, int, torch.Tensor | None]:
    """Panels, their kind in kernels/cpu/group_tiles.h, what their codes have too much, and a table of bytes."""
    if weight.masks is not None:
        return pack_sparse(SparseCodes(weight.codes, weight.masks)), _SPARSE, 0, None
    if weight.values is not None:
        table = (weight.values.short() + _SIGNED).to(torch.uint8)
        return pack_nibbles_in_panels(weight.codes), _TABLE, _SIGNED, table
    if weight.bits == 4:
        return pack_nibbles_in_panels(weight.codes), _NIBBLES, weight.offset, None
    if weight.bits < 8:
        return (
            pack_bits_in_panels(weight.codes, weight.bits),
            _FIVES if weight.bits == 5 else _SIXES,
            weight.offset,
            None,
        )
    return pack_int8(weight.codes), _BYTES, weight.offset + _SIGNED, None


def reference(
    x: torch.Tensor,
    format: SparseInt8Format | Int8Format,
    weight: GroupedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`CpuGroupedMatmul` with torch's operators: x [M, K] float."""
    if isinstance(format, Int8Format):
        codes = quantize.reference(x, format)
        terms, group_scale = codes.high.float()[None], codes.scale
    else:
        terms, token_scale = sparse_reference(x, format)
    # Nibbles come in pairs.
    terms = F.pad(terms, (0, weight.in_features - x.shape[1]))
    scale = None if weight.scale is None else weight.scale.expand()
    minimum = None if weight.minimum is None else weight.minimum.expand()
    totals = torch.zeros(len(terms), len(x), len(weight.codes))
    size = weight.group_size
    groups = zip(terms.split(size, dim=2), weight.integers().split(size, dim=1), strict=True)
    for group, (part, weights) in enumerate(groups):
        # Sums of at most 128 * 127 * 128: floats hold them, and what they are made of, exactly.
        share = part @ weights.t()
        if isinstance(format, Int8Format):
            share *= group_scale[:, group, None]
        totals += share if scale is None else share * scale[:, group]
        if minimum is not None:
            totals += part.sum(dim=2, keepdim=True) * minimum[:, group]
    value = totals[0]
    if isinstance(format, SparseInt8Format):
        value = value.mul_(HIGH_STEPS).add_(totals[1]).mul_(token_scale)
    if row_scale is not None:
        value = value.mul_(row_scale)
    return (value if bias is None else value.add_(bias)).to(x.dtype)
