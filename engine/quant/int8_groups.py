"""Int8 in groups: a scale for each 32 weights along K, or a multiple of that, int8 activations, exact int32 sums.

    w[n, k] ≈ weight[n, k] * scale[n, k // group_size]          scale[n, g] = max_{k in g} |w[n, k]| / 127, in fp16

In groups of 32 it is the grid of GGUF's Q8_0. An outlier among the weights takes steps from its group rather than its
row, for two bytes a group and the groups' sums as floats. Activations are as in `engine.quant.int8`, except that on a
GPU two terms have the weight's groups: its kernel multiplies weights in groups by activations in the same ones.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from engine.errors import ConfigError
from engine.kernels.launch import runs_triton
from engine.kernels.matmul.cpu_grouped import GROUP_SIZES
from engine.kernels.matmul.int8 import Int8Matmul
from engine.kernels.operands import GroupSize, Int8Format
from engine.quant.cpu_formats import GROUP_SIZE, cpu_grouped_product
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import GridWeight, Weight, signed_grid, take_rows, to_float
from engine.quant_spec import ActivationTerms

_ELEMENTS = 2**15
"""Rounded at a time: torch has one thread do what is so small, and it stays in a processor's cache."""

KEPT_PRECISION = 2**-10
"""Relative. A scale that fp16 holds so well is rounded and its codes are kept: at a code of 127 that is an eighth of
a step, where new codes would be off by up to half a step."""


@dataclass(frozen=True)
class Int8Groups:
    """int8 weights with groups along K × int8 activations; the last group is shorter where K is no multiple.

    Attributes:
        group_size: A multiple of 32.
        activations: On a GPU not "token".

    Raises:
        ConfigError: Another group size.
    """

    group_size: int = 32
    activations: ActivationTerms = "default"
    integer_sums: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.group_size <= 0 or self.group_size % GROUP_SIZES[-1]:
            raise ConfigError(
                f"quant: groups of int8 weights are multiples of {GROUP_SIZES[-1]}, got {self.group_size}"
            )

    @property
    def name(self) -> str:
        suffix = "" if self.activations == "default" else f"-{self.activations}"
        return f"int8-g{self.group_size}{suffix}"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        num_groups = -(-in_features // self.group_size)
        return {
            "weight": torch.empty(out_features, in_features, dtype=torch.int8, device="meta"),
            "scale": torch.empty(out_features, num_groups, dtype=torch.float16, device="meta"),
        }

    def quantize(self, weight: Weight) -> Tensors:
        weight = signed_grid(weight)
        if self._is_own_grid(weight):
            assert isinstance(weight, GridWeight)
            return {"weight": weight.codes, "scale": weight.scale.to(torch.float16)}
        stored = {
            name: torch.empty_like(tensor, device="cpu")
            for name, tensor in self.storage(*weight.shape).items()
        }

        def round_rows(rows: torch.Tensor) -> None:
            for name, tensor in self._round(take_rows(weight, rows)).items():
                stored[name][rows[0] : rows[-1] + 1] = tensor

        # By rows: the floats of a large table are gigabytes.
        num_rows = max(1, _ELEMENTS // weight.shape[1])
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(round_rows, torch.split(torch.arange(weight.shape[0]), num_rows)))
        return stored

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        shapes = self.storage(out_features, in_features)
        codes = torch.randint(-127, 128, shapes["weight"].shape, dtype=torch.int8, device=device)
        # Uniform codes of -127 … 127 deviate by 73.3.
        step = in_features**-0.5 / 73.3
        return {
            "weight": codes,
            "scale": torch.full(shapes["scale"].shape, step, dtype=torch.float16, device=device),
        }

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        """
        Raises:
            ConfigError: One scale a token on a GPU.
        """
        weight = tensors["weight"]
        size = GROUP_SIZE if self.activations == "groups" else kernel_group_size(self.group_size)
        scale = repeat_groups(tensors["scale"], self.group_size, size, weight.shape[1])
        if not runs_triton(weight):
            return cpu_grouped_product(weight, scale, size, bias, self.activations)
        if self.activations == "token":
            groups = f"int8:g{self.group_size}"
            raise ConfigError(
                "quant: a GPU multiplies int8 weights in groups by activations in groups; instead of "
                f"{groups}:token take {groups}, {groups}:groups or int8:token"
            )
        terms: Literal[1, 2] = 1 if self.activations == "groups" else 2
        return Int8Matmul(weight, scale.float(), bias, Int8Format(terms, size))

    def _round(self, weight: Weight) -> Tensors:
        values = to_float(weight).float()
        rows, columns = values.shape
        padded = torch.nn.functional.pad(values, (0, -columns % self.group_size))
        groups = padded.view(rows, -1, self.group_size)
        scale = (groups.abs().amax(dim=2) / 127).to(torch.float16)
        # Codes are of the scale that is stored. A group of zeros, or next to them, gets codes of zeros.
        steps = torch.where(scale > 0, scale.float(), torch.inf)[:, :, None]
        codes = (groups / steps).round_().clamp_(-127, 127).to(torch.int8)
        return {"weight": codes.view(rows, -1)[:, :columns], "scale": scale}

    def _is_own_grid(self, weight: Weight) -> bool:
        if (
            not isinstance(weight, GridWeight)
            or weight.codes.dtype != torch.int8
            or weight.minimum is not None
        ):
            return False
        if weight.group_size != self.group_size or weight.scale.dtype == torch.float16:
            return weight.group_size == self.group_size
        scale = weight.scale.float()
        is_held = (scale.to(torch.float16).float() - scale).abs() <= KEPT_PRECISION * scale.abs()
        return bool(is_held.all())


def kernel_group_size(group_size: int) -> GroupSize:
    """The largest groups that the kernels know and that these are made of."""
    return next(size for size in GROUP_SIZES if group_size % size == 0)


def repeat_groups(scale: torch.Tensor, group_size: int, size: int, in_features: int) -> torch.Tensor:
    """Scales [N, groups] of groups that are whole numbers of smaller ones, for each of these."""
    return scale.repeat_interleave(group_size // size, dim=1)[:, : -(-in_features // size)].contiguous()
