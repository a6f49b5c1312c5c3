"""Products on a CPU: int8 activations × int8 weights or those of codebooks, and float × float.

    x[m, k] = (128 * high[m, k] + low[m, k]) * s[m]                               see `engine.kernels.quantize`
    y[m, n] = (float(Σ_k high * w) * 128 + float(Σ_k low * w)) * s[m] * scale[n] + bias[n]       w[n, k] int8

Both sums are int32 and exact; a codebook's weight is an int8 one that is stored in four bits (`CodebookGrid`). So y
is equal to the bit for every number of tokens, tile, instruction set and body. A float product adds up in the order
of K.

The C bodies read weights in panels of 16 output features; see kernels/cpu/matmul.c. A product is a module whose
buffers are what C reads: made on the meta device, it says what a file must hold to be read instead of packed anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels import cpu, embedding
from engine.kernels.cpu.signatures import Argument
from engine.kernels.matmul.codebook import SCALE_SIZE
from engine.kernels.matmul.int8 import MAX_IN_FEATURES
from engine.kernels.matmul.sparse24 import SparseCodes
from engine.kernels.nibbles import unpack_nibbles
from engine.kernels.operands import Activations, Format, SparseInt8Activations, SparseInt8Format
from engine.kernels.quantize import HIGH_STEPS, quantize_sparse, sparse_reference

PANEL = 16
"""Output features that lie together."""

ALIGNMENT = 64
"""Input features are padded to a multiple of this."""

FRACTION = 256
"""Steps of a codebook's values in one int8 code."""

BLOCK_BYTES = SCALE_SIZE * PANEL // 2
"""Bytes of a codebook's codes in a panel, for as many input features as share a scale."""

ROWS_AT_A_TIME = 1024
"""Rows of a codebook's weight that torch's operators expand at a time, so that no copy of all is held."""


@dataclass(frozen=True, slots=True)
class CodebookGrid:
    """Four bits a weight, and the int8 codes that they stand for.

    w[n, k] = values[n, c]                                                              without factors
    w[n, k] = ((values[c] * factor[n, k // 64] + 2**14 >> 15) + 128) >> 8               with factors

    Attributes:
        nibbles: [N, ceil(K / 2)] uint8: c, those of even k in the low halves.
        values: [N, 16] int8; with factors [16] int16 in 256ths of a code, at most 127 * 256.
        factor: [N, ceil(K / 64)] int16, in steps of 2**-15, or None.
    """

    nibbles: torch.Tensor
    values: torch.Tensor
    factor: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """N and K, which is even."""
        return self.nibbles.shape[0], 2 * self.nibbles.shape[1]

    def expand(self, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows of the int8 weight, [end - start, K]."""
        codes = unpack_nibbles(self.nibbles[start:end]).long()
        if self.factor is None:
            return self.values[start:end].gather(1, codes)
        products = self.factor[start:end, :, None].int() * self.values.int()
        tables = (((products + (1 << 14)) >> 15) + FRACTION // 2) >> 8
        blocks = F.pad(codes, (0, -codes.shape[1] % SCALE_SIZE)).view(*tables.shape[:2], SCALE_SIZE)
        return tables.to(torch.int8).gather(2, blocks).flatten(1)[:, : codes.shape[1]]


CpuWeight = torch.Tensor | CodebookGrid | SparseCodes
"""What `CpuInt8Matmul` multiplies with; a tensor is [N, K] int8, sparse codes are of eight bits."""


def codebook_grid(
    nibbles: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None
) -> tuple[CodebookGrid, torch.Tensor]:
    """The int8 grid of a row that holds a codebook's weight best, and the codes on it.

    Args:
        nibbles: [N, ceil(K / 2)] uint8, as in `CodebookGrid`.
        codebook: [N, 16] float; with scales [1, 16].
        scale: [N, ceil(K / 64)] float: the weight is codebook * scale; None: it is the codebook.

    Returns:
        The grid, and the rows' scales [N] float32.
    """
    # The largest that any code can stand for, so that no code leaves the grid.
    codebook = codebook.float()
    largest = codebook.abs().amax(dim=1)
    if scale is not None:
        largest_factor = scale.float().abs().amax(dim=1)
        steps = codebook[0] / torch.where(largest > 0, largest, 1.0) * (127 * FRACTION)
        ratio = scale.float() / torch.where(largest_factor > 0, largest_factor, 1.0)[:, None]
        factor = (ratio * 2**15).round_().clamp_(max=2**15 - 1).to(torch.int16)
        grid = CodebookGrid(nibbles, steps.round_().to(torch.int16), factor)
        largest = largest * largest_factor
    row_scale = torch.where(largest > 0, largest / 127, 1.0)
    if scale is None:
        values = (codebook / row_scale[:, None]).round_().to(torch.int8)
        grid = CodebookGrid(nibbles, values, None)
    return grid, row_scale


def run_packing(
    operation: str, shape: tuple[int, ...], num_threads: int, **arguments: Argument
) -> torch.Tensor:
    """The panels, uint8 of a shape, that an operation of kernels/cpu/pack.c makes of a matrix.

    Args:
        arguments: The operation's, but for its output; the first tensor says on which device it is to be.
    """
    device = next(one.device for one in arguments.values() if isinstance(one, torch.Tensor))
    packed = torch.empty(shape, dtype=torch.uint8, device=device)
    if not packed.is_meta:
        cpu.run(operation, len(packed), num_threads, **arguments, output=packed)
    return packed


def pack_int8(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] int8 → panels [N / 16, K / 4, 16, 4] uint8, padded with zeros, plus 128."""
    rows, columns = weight.shape
    shape = (-(-rows // PANEL), -(-columns // ALIGNMENT) * ALIGNMENT // 4, PANEL, 4)
    return run_packing(
        "pack_int8", shape, torch.get_num_threads(), weight=weight.contiguous(), rows=rows, columns=columns
    )


def pack_codebook(grid: CodebookGrid) -> torch.Tensor:
    """Panels of tables and nibbles, [N / 16, bytes] uint8; kernels/cpu/pack.c says how."""
    rows, num_bytes = grid.nibbles.shape
    num_blocks = -(-2 * num_bytes // SCALE_SIZE)
    line = cpu.LINE
    header = 16 * PANEL if grid.factor is None else line + -(-2 * PANEL * num_blocks // line) * line
    panel_bytes = header + num_blocks * BLOCK_BYTES
    return run_packing(
        "pack_codebook",
        (-(-rows // PANEL), panel_bytes),
        1,
        codes=grid.nibbles.contiguous(),
        rows=rows,
        num_bytes=num_bytes,
        values=grid.values.contiguous(),
        factors=grid.factor,
        panel_bytes=panel_bytes,
    )


def pack_sparse(weight: SparseCodes) -> torch.Tensor:
    """Panels of kept codes and their places, [N / 16, bytes] uint8; kernels/cpu/sparse_tiles.h says how."""
    rows, columns = weight.shape
    quads = -(-columns // ALIGNMENT) * ALIGNMENT // 4
    return run_packing(
        "pack_sparse",
        (-(-rows // PANEL), quads * PANEL * (2 * weight.bits + 4) // 8),
        torch.get_num_threads(),
        kept=weight.kept.contiguous(),
        masks=weight.masks.contiguous(),
        rows=rows,
        columns=columns,
        bits=weight.bits,
    )


def pack(weight: CpuWeight) -> tuple[torch.Tensor, int]:
    """The panels, and what they are for the C bodies: kernels/cpu/term_sums.h."""
    match weight:
        case CodebookGrid():
            return pack_codebook(weight), 1 if weight.factor is None else 2
        case SparseCodes():
            return pack_sparse(weight), 3
    return pack_int8(weight), 0


def pad_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """[N] → [N padded to panels] float32."""
    return None if x is None else F.pad(x.float(), (0, -x.shape[0] % PANEL))


def look_up(
    operation: str,
    token_ids: torch.Tensor,
    in_features: int,
    dtype: torch.dtype,
    factor: float,
    **arguments: Argument,
) -> torch.Tensor:
    """Rows of a weight in panels, [T, K] of `dtype` times a factor, by an operation that looks them up.

    Args:
        token_ids: [T] int32 or int64.
        arguments: The operation's, but for those named here.
    """
    rows = cpu.empty(operation, len(token_ids), in_features)
    is_float32 = dtype == torch.float32
    cpu.run(
        operation,
        len(token_ids),
        indices=token_ids.int(),
        size=in_features,
        factor=factor if is_float32 else 1.0,
        output=rows,
        **arguments,
    )
    return rows if is_float32 else embedding.multiplied(rows.to(dtype), factor)


class CpuInt8Matmul(nn.Module):
    """The product with one weight.

    Args:
        weight: [N, K] int8, or what stands for such; K at most `MAX_IN_FEATURES`.
        scale: [N] float32.
        bias: [N] float32.
        format: How the activations are quantized.

    Attributes:
        format: That which the product takes ready-made; None where torch's operators compute.
    """

    def __init__(
        self,
        weight: CpuWeight,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        format: SparseInt8Format,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if self.in_features > MAX_IN_FEATURES:
            raise ValueError(
                f"int8 sums of {self.in_features} products can overflow; at most {MAX_IN_FEATURES}"
            )
        self._format = format
        self.format: Format = None
        self.weight: CpuWeight
        self.scale: torch.Tensor
        self.bias: torch.Tensor | None
        if cpu.library() is None:
            self.weight, self.scale, self.bias = weight, scale, bias
            return
        self.format = format
        packed, self._kind = pack(weight)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", pad_rows(scale))
        self.register_buffer("bias", pad_rows(bias))

    def forward(self, x: Activations) -> torch.Tensor:
        """[M, K] floats, or the format's codes → [M, N] of their dtype."""
        if self.format is None:
            assert isinstance(x, torch.Tensor)
            return self._multiply_in_torch(x)
        if isinstance(x, torch.Tensor):
            x = quantize_sparse(x, self._format)
        assert isinstance(x, SparseInt8Activations)
        assert isinstance(self.weight, torch.Tensor)
        y = cpu.empty("int8_matmul", x.num_tokens, self.out_features)
        cpu.run(
            "int8_matmul",
            x.num_tokens,
            **x.arguments(),
            weight=self.weight,
            weight_kind=self._kind,
            scale=self.scale,
            bias=self.bias,
            features=self.out_features,
            output=y,
        )
        return y

    def _multiply_in_torch(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight, torch.Tensor):
            return reference(x, self._format, self.weight, self.scale, self.bias)
        parts = []
        for start in range(0, self.out_features, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            bias = None if self.bias is None else self.bias[rows]
            codes = self.weight.expand(rows.start, rows.stop)
            parts.append(reference(x, self._format, codes, self.scale[rows], bias))
        return torch.cat(parts, dim=1)


def reference(
    x: torch.Tensor,
    format: SparseInt8Format,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`CpuInt8Matmul` with torch's operators: x [M, K] float, weight [N, K] int8."""
    num_tokens = x.shape[0]
    terms, token_scale = sparse_reference(x, format)
    # torch's product is wrong for K = 1; a codebook's weight has an even K.
    transposed = F.pad(weight, (0, -weight.shape[1] % 2)).t()
    high, low = F.pad(terms, (0, len(transposed) - x.shape[1])).to(torch.int8)
    if num_tokens == 1:
        sums = torch.stack([torch._int_mm(term, transposed) for term in (high, low)])
    else:
        sums = torch._int_mm(torch.cat((high, low)), transposed).unflatten(0, (2, num_tokens))
    # Each operator rounds once: one that fuses a product and a sum may round differently in its tails.
    value = sums[0].float().mul_(HIGH_STEPS).add_(sums[1]).mul_(token_scale).mul_(scale)
    return (value if bias is None else value.add_(bias)).to(x.dtype)


class CpuFloatMatmul(nn.Module):
    """float32 × float32: each output is one chain of fused products along K.

    Args:
        weight: [N, K] float32.
        bias: [N] float32.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        padded = F.pad(weight, (0, 0, 0, -self.out_features % PANEL))
        panels = padded.view(-1, PANEL, self.in_features).transpose(1, 2).contiguous()
        self.register_buffer("weight", panels)
        self.register_buffer("bias", pad_rows(bias))
        self.format: Format = None

    def forward(self, x: Activations) -> torch.Tensor:
        """[M, K] → [M, N]."""
        assert isinstance(x, torch.Tensor)
        x = x.contiguous()
        y = cpu.empty("float_matmul", x.shape[0], self.out_features)
        if y.data_ptr() == x.data_ptr():
            # What it reads is the result of one like it, of the same shape: the inner of two factors.
            y = cpu.empty("float_matmul of one", x.shape[0], self.out_features)
        cpu.run(
            "float_matmul",
            x.shape[0],
            x=x,
            size=self.in_features,
            weight=self.weight,
            bias=self.bias,
            features=self.out_features,
            output=y,
        )
        return y

    def rows(self, token_ids: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
        """See `engine.quant.scheme.TableMatmul`."""
        return look_up("float_rows", token_ids, self.in_features, dtype, factor, weight=self.weight)
