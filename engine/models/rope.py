"""Frequencies of rotary embeddings, with the ways to stretch them beyond the original context."""

from __future__ import annotations

import math
from typing import Any

import torch

from engine.models.config import RopeConfig


class RotaryTable:
    """Cosines and sines of every position.

    Args:
        num_positions: Positions 0 … num_positions - 1 are tabulated.

    Attributes:
        cosine, sine: [num_positions, head_dim / 2] float32.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> None:
        frequencies, magnitude = rotary_frequencies(rope, head_dim)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
        # In place: tables of a long context take tens of megabytes.
        self.sine = angles.sin().mul_(magnitude).to(device)
        self.cosine = angles.cos_().mul_(magnitude).to(device)


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Radians a position for each pair of dimensions, [head_dim / 2] float32, and the factor of cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    scaling = dict(rope.scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequencies, rope.theta, head_dim, scaling)
    return frequencies, 1.0


def _llama3(frequencies: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between blended by their wavelength."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


def _yarn(
    frequencies: torch.Tensor, theta: float, head_dim: int, scaling: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023): a ramp over the dimensions, and a temperature of the attention."""
    factor = scaling["factor"]
    context = scaling["original_max_position_embeddings"]

    def dimension_of(num_turns: float) -> float:
        """The dimension pair that turns this often over the original context."""
        return head_dim * math.log(context / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.get("beta_fast", 32)), dimension_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    blended = stretched * frequencies / factor + (1 - stretched) * frequencies

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in scaling:
        return blended, float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return blended, magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return blended, magnitude(1.0)
