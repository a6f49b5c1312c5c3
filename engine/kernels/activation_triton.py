"""The Triton body of `engine.kernels.activation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Tile, launch, select_tile, target_of
from engine.kernels.operands import Activations, Format, Int8Format
from engine.kernels.quantize_triton import (
    empty_activations,
    group_of,
    is_rotated,
    outputs,
    row_tile,
    write_row,
)


def gated_in_triton(gate_up: torch.Tensor, activation: str, format: Format, tile: Tile | None) -> Activations:
    """`silu_mul` with the activation "silu", `gelu_mul` with "gelu_tanh"."""
    target = target_of(gate_up)
    assert target is not None
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = empty_activations(num_tokens, size, gate_up, format)
    if isinstance(format, Int8Format) and format.group_size is None:
        tile = row_tile(size)  # one scale a token: a program sees all of it
    else:
        tile = tile or select_tile(target, "activation", num_tokens)
    launch(
        _gated_kernel,
        (num_tokens, triton.cdiv(size, tile["BLOCK"])),
        {"gate_up": gate_up, **outputs(y), "size": size},
        tile,
        GROUP=group_of(format, tile["BLOCK"]),
        ROTATED=is_rotated(format),
        ACTIVATION=activation,
    )
    return y


@triton.jit
def _gated_kernel(
    gate_up,
    output,
    low,
    scale,
    size,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    is_column = columns < size
    gate_up += row * (2 * size) + columns
    gate = tl.load(gate_up, is_column, 0.0).to(tl.float32)
    up = tl.load(gate_up + size, is_column, 0.0).to(tl.float32)
    inner = gate
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), here with u = sqrt(2 / pi) * (x + 0.044715 x³)
        inner = 1.5957691216057308 * (gate + 0.044715 * (gate * gate * gate))
    # exp overflows to infinity and the quotient to 0, as it should.
    values = gate / (1.0 + tl.exp(-inner)) * up
    values = values.to(gate_up.dtype.element_ty).to(tl.float32)
    write_row(values, row, first, size, output, low, scale, BLOCK, GROUP, ROTATED)
