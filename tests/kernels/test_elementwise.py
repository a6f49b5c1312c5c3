"""Norm, gates and rotary embedding on the CPU against their formulas."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.norm import reference as norm_reference
from engine.kernels.norm import rms_norm
from engine.kernels.rotary import apply_rotary, reference, rotate_and_write, torch_rotate_and_write


def test_rms_norm_equals_its_formula() -> None:
    x, weight = torch.randn(5, 96), torch.randn(96)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), norm_reference(x, weight, 1e-5))


def test_gates() -> None:
    gate_up = torch.randn(3, 10)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(silu_mul(gate_up), gate * torch.sigmoid(gate) * up)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(gelu_mul(gate_up), 0.5 * gate * (1 + torch.tanh(inner)) * up)


def test_rotary_rotates_pairs() -> None:
    heads = torch.randn(4, 2, 6)
    angles = torch.rand(4, 1, 3)
    cosine, sine = angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)
    rotated = apply_rotary(heads, cosine, sine)
    as_complex = torch.complex(heads[..., :3], heads[..., 3:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotated, torch.cat((as_complex.real, as_complex.imag), dim=-1))


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_rotates_and_writes_where_there_is_no_c_body(
    dtype: torch.dtype, has_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.kernels.cpu.library", lambda: None)
    heads = torch.randn(7, 6 + 2 * 2, 80).to(dtype)
    angles = torch.rand(50, 40) * 6
    positions, slots = torch.randint(0, 50, (7,)).int(), torch.randperm(36)[:7].int()
    norms = (torch.rand(2, 80) + 0.5).to(dtype) if has_norm else (None, None)
    layers = [KVLayer(torch.zeros(2, 9, 4, 2, 80).to(dtype)) for _ in range(3)]
    actual, expected, in_torch = (
        function(heads, positions, angles.cos(), angles.sin(), layer, slots, 2, *norms, 1e-6)
        for function, layer in zip((rotate_and_write, reference, torch_rotate_and_write), layers, strict=True)
    )
    assert torch.equal(actual, in_torch)
    assert torch.equal(layers[0].data, layers[2].data)
    # In float32 alike; else rounded after the norm, and of cosines, products and their sums.
    step = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for one, other in ((actual, expected), (layers[0].keys, layers[1].keys)):
        size = other.float().abs().amax(-1, keepdim=True)
        error = (one.float() - other.float()).abs()
        assert (error <= (step + 2**-20) * size).all()
    assert torch.equal(layers[0].values, layers[1].values)
    written = layers[0].data.flatten(1, 2).abs().amax((0, 2, 3)).nonzero()[:, 0]
    assert torch.equal(written, slots.sort().values)
