"""int8 schemes on a GPU: which of the kernels' forms each takes, by what its product is in plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels.matmul.int8 import reference
from engine.kernels.operands import GroupSize, Int8Format
from engine.kernels.quantize import quantize_per_token
from engine.quant.int8 import Int8
from engine.quant.int8_groups import Int8Groups
from engine.quant.int8_weight_only import Int8WeightOnly

CASES = [
    (Int8(), Int8Format(2)),
    (Int8("token"), Int8Format(1)),
    (Int8("groups"), Int8Format(1, 32)),
    (Int8("two-terms"), Int8Format(2)),
    (Int8Groups(32), Int8Format(2, 32)),
    (Int8Groups(64, "two-terms"), Int8Format(2, 64)),
    (Int8Groups(128), Int8Format(2, 128)),
    (Int8Groups(256), Int8Format(2, 128)),
    (Int8Groups(32, "groups"), Int8Format(1, 32)),
    (Int8Groups(128, "groups"), Int8Format(1, 32)),
]


@pytest.mark.parametrize(("scheme", "format"), CASES, ids=lambda case: str(case))
@pytest.mark.parametrize("columns", [96, 300])
def test_int8_products(scheme: Int8 | Int8Groups, format: Int8Format, columns: int) -> None:
    stored, x, bias = scheme.quantize(torch.randn(33, columns)), torch.randn(3, columns), torch.randn(33)
    scale = stored["scale"]
    if isinstance(scheme, Int8Groups):
        assert format.group_size is not None
        elements = scale.float().repeat_interleave(scheme.group_size, dim=1)[:, :columns]
        scale = elements[:, :: format.group_size]
    matmul = scheme.bind(stored, bias)
    assert matmul.format == format
    terms = quantize_per_token(x, format)
    expected = reference(terms, stored["weight"], scale, bias, format.group_size)
    assert torch.equal(matmul(x), expected)
    assert torch.equal(matmul(terms), expected)


def test_weights_in_groups_with_one_scale_a_token_are_refused() -> None:
    scheme = Int8Groups(64, "token")
    with pytest.raises(ConfigError, match=r"int8:g64:token take int8:g64, int8:g64:groups or int8:token"):
        scheme.bind(scheme.quantize(torch.randn(16, 64)), None)


@pytest.mark.parametrize("group_size", [None, 32, 64, 128, 256])
def test_weight_only_products(group_size: GroupSize | int | None) -> None:
    scheme = Int8WeightOnly(group_size)
    stored, x, bias = scheme.quantize(torch.randn(33, 300)), torch.randn(3, 300), torch.randn(33)
    scale = stored["scale"].double().view(33, -1).repeat_interleave(group_size or 300, dim=1)[:, :300]
    weight = stored["weight"].double() * scale
    matmul = scheme.bind(stored, bias)
    assert matmul.format is None
    expected = x.double() @ weight.t() + bias
    # 300 products and what joins them each round to 2**-24 of at most the sum of magnitudes.
    bound = 310 * 2**-24 * (x.double().abs() @ weight.abs().t() + bias.abs())
    assert torch.all((matmul(x) - expected).abs() <= bound)
