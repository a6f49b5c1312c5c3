"""Products of the same activations with several weights, their outputs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from engine.kernels import cpu
from engine.kernels.matmul.cpu_grouped import CpuGroupedMatmul
from engine.kernels.operands import Activations, Format, num_tokens


class StackedMatmul(nn.Module):
    """The product with weights [N_i, K] of different forms that are stacked along N.

    Args:
        matmuls: On a CPU with the C kernels all of them `CpuGroupedMatmul`.
        sizes: N_i.

    Attributes:
        format: What all products take ready-made; None where that is not the same.
    """

    def __init__(
        self, matmuls: Sequence[Callable[[Activations], torch.Tensor]], sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self._matmuls, self._sizes = tuple(matmuls), tuple(sizes)
        for index, matmul in enumerate(matmuls):
            if isinstance(matmul, nn.Module):
                self.register_module(str(index), matmul)
        formats = {getattr(matmul, "format", None) for matmul in matmuls}
        self.format: Format = formats.pop() if len(formats) == 1 else None

    def forward(self, x: Activations) -> torch.Tensor:
        """[M, K] → [M, sum of N_i], of the activations' dtype."""
        grouped = [matmul for matmul in self._matmuls if isinstance(matmul, CpuGroupedMatmul)]
        if cpu.library() is None or len(grouped) < len(self._matmuls):
            return torch.cat([matmul(x) for matmul in self._matmuls], dim=1)
        y = cpu.empty("stacked_matmul", num_tokens(x), sum(self._sizes))
        for matmul, part in zip(grouped, y.split(self._sizes, dim=1), strict=True):
            matmul(x, part)
        return y
