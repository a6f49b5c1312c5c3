"""Int8Table: an embedding table of eight bits in groups of 32 along K, the grid of GGUF's Q8_0."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from engine.kernels.embedding import GROUP_SIZE, lookup
from engine.quant.scheme import Tensors
from engine.quant.weight import GridWeight, Weight, signed_grid, take_rows, to_float

_ELEMENTS = 2**15
"""Rounded at a time: torch has one thread do what is so small, and it stays in a processor's cache."""


@dataclass(frozen=True)
class Int8Table:
    """w[n, k] ≈ codes[n, k] * scale[n, k // 32]; rows are looked up, never multiplied."""

    name: str = "int8g32"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        num_groups = -(-in_features // GROUP_SIZE)
        return {
            "codes": torch.empty(out_features, in_features, dtype=torch.int8, device="meta"),
            "scale": torch.empty(out_features, num_groups, dtype=torch.float16, device="meta"),
        }

    def quantize(self, weight: Weight) -> Tensors:
        weight = signed_grid(weight)
        if isinstance(weight, GridWeight) and weight.minimum is None and weight.group_size == GROUP_SIZE:
            return {"codes": weight.codes, "scale": weight.scale}
        # By rows: the floats of a large table are gigabytes.
        stored = {
            name: torch.empty_like(tensor, device="cpu")
            for name, tensor in self.storage(*weight.shape).items()
        }

        def round_rows(rows: torch.Tensor) -> None:
            for name, tensor in _round(take_rows(weight, rows)).items():
                stored[name][rows[0] : rows[-1] + 1] = tensor

        num_rows = max(1, _ELEMENTS // weight.shape[1])
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(round_rows, torch.split(torch.arange(weight.shape[0]), num_rows)))
        return stored

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        shape = (out_features, in_features)
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        shape = (out_features, -(-in_features // GROUP_SIZE))
        return {"codes": codes, "scale": torch.full(shape, 1 / 73.3, dtype=torch.float16, device=device)}

    def lookup(
        self, tensors: Tensors, token_ids: torch.Tensor, dtype: torch.dtype, factor: float
    ) -> torch.Tensor:
        """Rows of the table times a factor: token_ids [T] → [T, K]."""
        return lookup(token_ids, tensors["codes"], tensors["scale"], dtype, factor)


def _round(weight: Weight) -> Tensors:
    values = to_float(weight).float()
    rows, columns = values.shape
    if columns % GROUP_SIZE:
        values = torch.nn.functional.pad(values, (0, -columns % GROUP_SIZE))
    groups = values.view(rows, -1, GROUP_SIZE)
    scale = (groups.abs().amax(dim=2) / 127).to(torch.float16)
    divisor = torch.where(scale > 0, scale.float(), 1.0)
    codes = (groups / divisor[:, :, None]).round_().clamp_(-127, 127).to(torch.int8)
    return {"codes": codes.view(rows, -1)[:, :columns].contiguous(), "scale": scale}
