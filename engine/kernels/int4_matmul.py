"""Float activations × int4 weights in groups along K. See `engine.quant.int4` for the grid.

The CPU body is torch's packed int4 product, which reads each weight once and computes a row the same way
whatever the other rows are. It takes bf16 scales; the fp16 ones are given as the sum of two bf16 terms, which
is exact, in two products. Activations and each product's result are bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, group_size: int, in_features: int
) -> torch.Tensor:
    """[N, K] float32 from nibbles [N, ceil(K / 2)] uint8 and fp16 scale and minimum [N, groups]."""
    nibbles = torch.stack((codes & 15, codes >> 4), dim=2).view(codes.shape[0], -1)
    padding = scale.shape[1] * group_size - nibbles.shape[1]
    groups = F.pad(nibbles, (0, padding)).view(*scale.shape, group_size)
    values = torch.addcmul(minimum.float()[:, :, None], groups.float(), scale.float()[:, :, None])
    return values.view(codes.shape[0], -1)[:, :in_features]


def reference(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, group_size: int
) -> torch.Tensor:
    """[M, K] float × int4 weight → [M, N], in float32."""
    weight = dequantize(codes, scale, minimum, group_size, x.shape[1])
    return (x.float() @ weight.t()).to(x.dtype)


class Int4Matmul:
    """The product with one int4 weight, prepared for its device.

    Args:
        codes: [N, ceil(K / 2)] uint8, element k in byte k // 2, the even ones in the low nibble.
        scale, minimum: [N, groups] float16.
    """

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, group_size: int
    ) -> None:
        self.codes, self.scale, self.minimum, self.group_size = codes, scale, minimum, group_size
        in_features, out_features = 2 * codes.shape[1], codes.shape[0]
        self.packed: torch.Tensor | None = None
        if codes.device.type == "cpu" and in_features % group_size == 0 and out_features % 16 == 0:
            nibbles = torch.stack((codes & 15, codes >> 4), dim=2).view(out_features, -1)
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
            # The packed product computes (code - 8) * scale + zero, with [groups, N, (scale, zero)].
            zero = minimum.float() + 8 * scale.float()
            pairs = torch.stack((scale.float(), zero), dim=2).transpose(0, 1).contiguous()
            self.high = pairs.to(torch.bfloat16)
            self.low = (pairs - self.high.float()).to(torch.bfloat16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] float → [M, N] of x's dtype."""
        if self.packed is None:
            return reference(x, self.codes, self.scale, self.minimum, self.group_size)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        rows = x.to(torch.bfloat16)
        high = product(rows, self.packed, self.group_size, self.high)
        low = product(rows, self.packed, self.group_size, self.low)
        return torch.add(high.float(), low).to(x.dtype)
