"""Schemes: how a weight matrix is stored, and how activations are multiplied with it.

A scheme is the one place that knows its storage and its arithmetic. Layers hold the tensors it names and
call the function it binds to them; they never look inside.

`storage`, `quantize` and `bind` are what the field knows as create_weights, process_weights_after_loading and apply
(vLLM's `QuantizeMethodBase`), with the product returned by `bind` instead of looked up in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from engine.kernels.matmul.cpu_sharded import ShardedInt8Matmul
from engine.kernels.operands import Activations, Format, SparseInt8Format
from engine.quant.weight import Weight

Tensors = dict[str, torch.Tensor]

LargestOfRow = Callable[[torch.Tensor], torch.Tensor]
"""From the largest |w| of each row of some columns, [N] float32, to that of the whole row."""


class Matmul(Protocol):
    """A product with one weight, bias included.

    Attributes:
        format: What it takes without work of its own; it takes floats in any case.
    """

    format: Format

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] → [M, N], of the activations' dtype."""
        ...


@runtime_checkable
class TableMatmul(Matmul, Protocol):
    """A product whose weight is an embedding's table, too: one copy serves both."""

    def rows(self, token_ids: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
        """Rows of the weight as it is stored, rounded to `dtype`, times a factor: token_ids [T] → [T, K].

        Args:
            token_ids: [T] int32 or int64, each below N.
        """
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


class IntegerSums(Protocol):
    """What a scheme offers ranks that share the columns of a weight: sums of integers, with the bits of one rank."""

    @property
    def format(self) -> SparseInt8Format:
        """The format of the activations that are summed."""
        ...

    def quantize(self, weight: Weight, largest_of_row: LargestOfRow) -> Tensors:
        """What the scheme's `quantize` makes of the whole weight, of a rank's columns of it."""
        ...

    def bind(
        self, tensors: Tensors, bias: torch.Tensor | None, outputs: slice, size: int
    ) -> ShardedInt8Matmul:
        """The part of the product of one rank of `size`.

        Args:
            bias: [N] float32, of all outputs.
            outputs: Those that the rank finishes.
        """
        ...


class Scheme(Storage, Protocol):
    """How a weight is stored and multiplied."""

    @property
    def integer_sums(self) -> IntegerSums | None:
        """How ranks that share the weight's columns add products up as integers; None where their sums are floats."""
        ...

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        """The product with these tensors, on their device; prepares what is prepared once.

        Args:
            bias: [N] float32.
        """
        ...
