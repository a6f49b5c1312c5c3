"""Quantization: schemes (how a weight is stored and multiplied) and the weights checkpoints hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.quant.floating import Float
from engine.quant.int4 import Int4
from engine.quant.int8 import Int8
from engine.quant.int8_table import Int8Table
from engine.quant.scheme import Scheme, TableScheme


@dataclass(frozen=True)
class QuantizationPlan:
    """Which scheme each kind of layer uses.

    The vocabulary projection keeps eight bits under int4: it is the layer whose rounding shows most in the
    tokens, and a small part of the weights of all but the smallest models.
    """

    linear: Scheme
    lm_head: Scheme
    embedding: TableScheme

    @property
    def name(self) -> str:
        return f"{self.linear.name}-{self.lm_head.name}-{self.embedding.name}"


def plan_quantization(
    quant: str, dtype: torch.dtype, group_size: int, deterministic: bool = False
) -> QuantizationPlan:
    """The schemes of `--quant none | int8 | int4`.

    Args:
        deterministic: Float products in one form for any number of tokens.
    """
    if quant == "int8":
        return QuantizationPlan(Int8(), Int8(), Int8Table())
    if quant == "int4":
        return QuantizationPlan(Int4(group_size, deterministic), Int8(), Int8Table())
    scheme = Float(dtype, deterministic)
    return QuantizationPlan(scheme, scheme, scheme)
