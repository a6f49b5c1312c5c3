"""Products on a CPU: int8 activations × int8 or int4 weights, and float × float.

    x[m, k] = (128 * high[m, k] + low[m, k]) * s[m]                               see `engine.kernels.quantize`
    y[m, n] = (float(Σ_k high * w) * 128 + float(Σ_k low * w)) * s[m] * scale[n] + bias[n]       w[n, k] int8

Both sums are int32 and exact; an int4 weight is an int8 one that is stored in fewer bits (`Int4Grid`). So y is equal
to the bit for every number of tokens, tile, instruction set and body. A float product adds up in the order of K.

The C bodies read weights in panels of 16 output features; see kernels/cpu/matmul.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.kernels import cpu
from engine.kernels.activations import Activations, Format, SparseInt8Activations, SparseInt8Format
from engine.kernels.int8_matmul import MAX_IN_FEATURES
from engine.kernels.nibbles import unpack_nibbles
from engine.kernels.quantize import HIGH_STEPS, quantize_sparse, sparse_reference

PANEL = 16
"""Output features that lie together."""

ALIGNMENT = 64
"""Input features are padded to a multiple of this."""

GROUP_SIZE = 32
"""Input features of an int4 weight that share a factor and an offset."""

GROUP_BYTES = 2 * 2 * PANEL + GROUP_SIZE * PANEL // 2
"""Of such a group in a panel."""

FRACTION = 256
"""Steps of an int4 weight's factor and offset in one of its int8 codes."""


@dataclass(frozen=True, slots=True)
class Int4Grid:
    """Four bits a weight, and what makes int8 codes of them: w = (code * factor + offset) // 256.

    Attributes:
        nibbles: [N, ceil(K / 2)] uint8: codes of 0 … 15, those of even k in the low halves.
        factor, offset: [N, ceil(K / 32)] int32; modulo 2**16 when stored.
    """

    nibbles: torch.Tensor
    factor: torch.Tensor
    offset: torch.Tensor

    def expand(self) -> torch.Tensor:
        """The int8 weight, [N, K] with K even."""
        codes = unpack_nibbles(self.nibbles)
        factor, offset = (
            x.repeat_interleave(GROUP_SIZE, dim=1)[:, : codes.shape[1]] for x in (self.factor, self.offset)
        )
        return ((codes * factor + offset) >> 8).to(torch.int8)


def int4_grid(
    nibbles: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
) -> tuple[Int4Grid, torch.Tensor]:
    """The int8 grid of a row that holds an int4 weight best, and the codes on it.

    Args:
        nibbles: [N, ceil(K / 2)] uint8, as in `Int4Grid`.
        scale, minimum: [N, ceil(K / 32)] float: the weight is codes * scale + minimum.

    Returns:
        The grid, and the rows' scales [N] float32.
    """
    scale, minimum = scale.float(), minimum.float()
    # The largest that any code can stand for, so that no code leaves the grid.
    largest = torch.maximum(minimum.abs(), (15 * scale + minimum).abs()).amax(dim=1)
    row_scale = torch.where(largest > 0, largest / 127, 1.0)
    factor, offset = ((x * (FRACTION / row_scale)[:, None]).round_().int() for x in (scale, minimum))
    # Half a step more: the quotient is rounded down.
    return Int4Grid(nibbles, factor, offset.add_(FRACTION // 2)), row_scale


def pack_int8(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] int8 → panels [N / 16, K / 4, 16, 4] uint8, padded with zero weights, each plus 128."""
    rows, columns = weight.shape
    packed = torch.empty(
        -(-rows // PANEL), -(-columns // ALIGNMENT) * ALIGNMENT // 4, PANEL, 4, dtype=torch.uint8
    )
    cpu.run("pack_int8", len(packed), weight.contiguous(), rows, columns, packed)
    return packed


def pack_int4(grid: Int4Grid) -> torch.Tensor:
    """Panels of nibbles, [N / 16, groups, 320] uint8; kernels/cpu/pack.c says how."""
    rows, num_bytes = grid.nibbles.shape
    num_groups = -(-2 * num_bytes // ALIGNMENT) * (ALIGNMENT // GROUP_SIZE)
    packed = torch.empty(-(-rows // PANEL), num_groups, GROUP_BYTES, dtype=torch.uint8)
    cpu.run(
        "pack_int4",
        len(packed),
        grid.nibbles.contiguous(),
        rows,
        num_bytes,
        grid.factor,
        grid.offset,
        grid.factor.shape[1],
        packed,
    )
    return packed


def pad_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """[N] → [N padded to panels] float32."""
    return None if x is None else F.pad(x.float(), (0, -x.shape[0] % PANEL))


class HostInt8Matmul:
    """The product with one weight.

    Args:
        weight: [N, K] int8, or an int4 weight's grid; K at most `MAX_IN_FEATURES`.
        scale: [N] float32.
        bias: [N] float32.
        format: How the activations are quantized.

    Attributes:
        format: That which the product takes ready-made; None where torch's operators compute.
    """

    def __init__(
        self,
        weight: torch.Tensor | Int4Grid,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        format: SparseInt8Format,
    ) -> None:
        is_int4 = isinstance(weight, Int4Grid)
        self.out_features, in_features = (
            weight.nibbles.shape if isinstance(weight, Int4Grid) else weight.shape
        )
        in_features *= 2 if is_int4 else 1
        if in_features > MAX_IN_FEATURES:
            raise ValueError(f"int8 sums of {in_features} products can overflow; at most {MAX_IN_FEATURES}")
        self._format, self.is_int4 = format, is_int4
        self.format: Format = None
        self.scale, self.bias = scale, bias
        if cpu.library() is None:
            self.weight = weight.expand() if isinstance(weight, Int4Grid) else weight
            return
        self.format = format
        self.weight = pack_int4(weight) if isinstance(weight, Int4Grid) else pack_int8(weight)
        self.scale, self.bias = F.pad(scale, (0, -scale.shape[0] % PANEL)), pad_rows(bias)

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] floats, or the format's codes → [M, N] of their dtype."""
        if self.format is None:
            assert isinstance(x, torch.Tensor)
            return reference(x, self._format, self.weight, self.scale, self.bias)
        if isinstance(x, torch.Tensor):
            x = quantize_sparse(x, self._format)
        assert isinstance(x, SparseInt8Activations)
        y = cpu.empty("int8_matmul", x.num_tokens, self.out_features)
        cpu.run(
            "int8_matmul",
            x.num_tokens,
            *x.arguments(),
            self.weight,
            int(self.is_int4),
            self.scale,
            self.bias,
            self.out_features,
            y,
        )
        return y


def reference(
    x: torch.Tensor,
    format: SparseInt8Format,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`HostInt8Matmul` with torch's operators: x [M, K] float, weight [N, K] int8."""
    num_tokens = x.shape[0]
    terms, token_scale = sparse_reference(x, format)
    # torch's product is wrong for K = 1; an int4 weight has an even K.
    transposed = F.pad(weight, (0, -weight.shape[1] % 2)).t()
    high, low = F.pad(terms, (0, len(transposed) - x.shape[1])).to(torch.int8)
    if num_tokens == 1:
        sums = torch.stack([torch._int_mm(term, transposed) for term in (high, low)])
    else:
        sums = torch._int_mm(torch.cat((high, low)), transposed).unflatten(0, (2, num_tokens))
    # Each operator rounds once: one that fuses a product and a sum may round differently in its tails.
    value = sums[0].float().mul_(HIGH_STEPS).add_(sums[1]).mul_(token_scale).mul_(scale)
    return (value if bias is None else value.add_(bias)).to(x.dtype)


class HostFloatMatmul:
    """float32 × float32: each output is one chain of fused products along K.

    Args:
        weight: [N, K] float32.
        bias: [N] float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        padded = F.pad(weight, (0, 0, 0, -self.out_features % PANEL))
        self.weight = padded.view(-1, PANEL, self.in_features).transpose(1, 2).contiguous()
        self.bias = pad_rows(bias)
        self.format: Format = None

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] → [M, N]."""
        assert isinstance(x, torch.Tensor)
        x = x.contiguous()
        y = cpu.empty("float_matmul", x.shape[0], self.out_features)
        cpu.run("float_matmul", x.shape[0], x, self.in_features, self.weight, self.bias, self.out_features, y)
        return y
