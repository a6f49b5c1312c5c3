"""Codes of GGUF's blocks: C takes out what numpy does, whole matrices and parts of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.kernels import cpu
from engine.loading.gguf.blocks import DECODERS, read_blocks
from engine.quant.block_weight import BlockWeight

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="there is no C compiler")


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_c_equals_numpy(kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (37, 9, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for data in (whole, whole[3:30], whole[:, 2:7], whole[:1, :1]):
        found = read_blocks(data, kind)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "library", lambda: None)
            expected = read_blocks(data, kind)
        assert type(found) is type(expected)
        for one, other in zip(tensors(found), tensors(expected), strict=True):
            # As bytes: random numbers of two bytes may be none.
            assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def tensors(weight: object) -> list[torch.Tensor]:
    if isinstance(weight, BlockWeight):
        return list(weight.parts.values())
    return [weight.codes, weight.scale]
