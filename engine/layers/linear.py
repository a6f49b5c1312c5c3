"""Linear layers and the embedding: modules that hold what their scheme stores.

A layer is built on the meta device, so that a whole model can be planned without memory; `load` quantizes the
checkpoint's weights into it, and `bind` prepares the product once the tensors are where they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from engine.kernels.activations import Activations
from engine.quant.scheme import Matmul, Scheme, TableScheme, Tensors
from engine.quant.weight import Weight

ReadWeight = Callable[[str], Weight]
"""Reads a tensor of the checkpoint by its Hugging Face name."""


class StoredLayer(nn.Module):
    """A module whose buffers are the tensors of a scheme."""

    def _store(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _stored(self) -> Tensors:
        return dict(self.named_buffers(recurse=False))


class Linear(StoredLayer):
    """y = x Wᵀ + b, where W may stack several matrices of the checkpoint that share their input.

    Args:
        sources: Names of the checkpoint's modules, e.g. q_proj, k_proj and v_proj of a layer.
        sizes: Output features of each.
    """

    def __init__(
        self, sources: Sequence[str], in_features: int, sizes: Sequence[int], scheme: Scheme, has_bias: bool
    ) -> None:
        super().__init__()
        self.sources, self.scheme, self.has_bias = tuple(sources), scheme, has_bias
        self.in_features, self.out_features, self.sizes = in_features, sum(sizes), tuple(sizes)
        self._store(scheme.storage(sum(sizes), in_features))
        if has_bias:
            self.register_buffer("bias", torch.empty(sum(sizes), dtype=torch.float32, device="meta"))
        self.matmul: Matmul

    def load(self, read: ReadWeight) -> None:
        parts = [self.scheme.quantize(read(f"{source}.weight")) for source in self.sources]
        self._store({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        if self.has_bias:
            biases = [read(f"{source}.bias") for source in self.sources]
            assert all(isinstance(bias, torch.Tensor) for bias in biases)
            self.bias = torch.cat([bias.float() for bias in biases if isinstance(bias, torch.Tensor)])

    def randomize(self, device: torch.device) -> None:
        """Random weights, for measurements (`--load-format dummy`)."""
        self._store(self.scheme.random(self.out_features, self.in_features, device))
        if self.has_bias:
            self.bias = torch.zeros(self.out_features, device=device)

    def bind(self) -> None:
        tensors = self._stored()
        bias = tensors.pop("bias", None)
        self.matmul = self.scheme.bind(tensors, bias)
        # The product holds what it needs, perhaps in an order of its own.
        self._buffers.clear()

    def forward(self, x: Activations) -> torch.Tensor:
        """[M, in_features] → [M, out_features]."""
        return self.matmul(x)


class Embedding(StoredLayer):
    """Rows of a table by token id, in the activations' dtype, times a factor."""

    def __init__(
        self,
        source: str,
        num_embeddings: int,
        features: int,
        scheme: TableScheme,
        dtype: torch.dtype,
        factor: float,
    ) -> None:
        super().__init__()
        self.source, self.scheme, self.dtype, self.factor = source, scheme, dtype, factor
        self.shape = (num_embeddings, features)
        self._store(scheme.storage(num_embeddings, features))
        self.tensors: Tensors

    def load(self, read: ReadWeight) -> None:
        self._store(self.scheme.quantize(read(f"{self.source}.weight")))

    def randomize(self, device: torch.device) -> None:
        self._store(self.scheme.random(*self.shape, device))

    def bind(self) -> None:
        self.tensors = self._stored()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 → [T, features]."""
        return self.scheme.lookup(self.tensors, token_ids, self.dtype, self.factor)
