"""The gated activations of the MLP: act(gate) * up, in the format that the next product wants."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels import cpu
from engine.kernels.launch import Tile, target_of
from engine.kernels.operands import Activations, Format
from engine.kernels.quantize import cpu_outputs


def silu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_mul` in torch's operators."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu_mul` in torch's operators."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def silu_mul(gate_up: torch.Tensor, format: Format = None, tile: Tile | None = None) -> Activations:
    """SwiGLU (Shazeer 2020): [M, 2 * I] of gates, then ups, contiguous → [M, I].

    Computed in float32; what is quantized or summed are the values rounded to gate_up's dtype.
    """
    return _gated(gate_up, "silu", format, tile)


def gelu_mul(gate_up: torch.Tensor, format: Format = None, tile: Tile | None = None) -> Activations:
    """GeGLU with the tanh form of GELU (Hendrycks and Gimpel 2016); else like `silu_mul`."""
    return _gated(gate_up, "gelu_tanh", format, tile)


def _gated(gate_up: torch.Tensor, activation: str, format: Format, tile: Tile | None) -> Activations:
    target = target_of(gate_up)
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    is_gelu = activation == "gelu_tanh"
    if target is None and cpu.serves(gate_up):
        assert gate_up.is_contiguous()
        product, outputs_of_c = cpu_outputs("gated", num_tokens, size, format)
        cpu.run("gated", num_tokens, gate_up=gate_up, size=size, is_gelu=int(is_gelu), **outputs_of_c)
        return product
    if target is None:
        return gelu_reference(gate_up) if is_gelu else silu_reference(gate_up)
    from engine.kernels.activation_triton import gated_in_triton

    return gated_in_triton(gate_up, activation, format, tile)
