"""Schemes: how a weight matrix is stored, and how activations are multiplied with it.

A scheme is the one place that knows its storage and its arithmetic. Layers hold the tensors it names and
call the function it binds to them; they never look inside.
"""

from __future__ import annotations

from typing import Protocol

import torch

from engine.kernels.operands import Activations, Format
from engine.quant.weight import Weight

Tensors = dict[str, torch.Tensor]


class Matmul(Protocol):
    """A product with one weight, bias included.

    Attributes:
        format: What it takes without work of its own; it takes floats in any case.
    """

    format: Format

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] → [M, N], of the activations' dtype."""
        ...


class Storage(Protocol):
    """How a weight [N, K] is stored. Every stored tensor has N rows, so that matrices stack."""

    @property
    def name(self) -> str:
        """Short, unique for storage and arithmetic: it goes into file names and hashes."""
        ...

    def storage(self, out_features: int, in_features: int) -> Tensors:
        """The tensors of a weight [out_features, in_features], on the meta device: shapes and dtypes."""
        ...

    def quantize(self, weight: Weight) -> Tensors:
        """The stored tensors for a weight [N, K], named and shaped as `storage` says."""
        ...

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        """Stored tensors of a random weight, made on the device as they are stored.

        A product deviates about as much as its input, so that a model of such weights has finite logits.
        """
        ...


class Scheme(Storage, Protocol):
    """How a weight is stored and multiplied."""

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        """The product with these tensors, on their device; prepares what is prepared once.

        Args:
            bias: [N] float32.
        """
        ...


class TableScheme(Storage, Protocol):
    """How an embedding table is stored and looked up."""

    def lookup(
        self, tensors: Tensors, token_ids: torch.Tensor, dtype: torch.dtype, factor: float
    ) -> torch.Tensor:
        """Rows of the table times a factor: token_ids [T] → [T, K] of `dtype`."""
        ...
