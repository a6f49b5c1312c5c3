"""Linear layers and the embedding: modules that hold what their scheme stores.

A layer is built on the meta device, so that a whole model can be planned without memory; `load` quantizes the
checkpoint's weights into it, and `bind` prepares the product once the tensors are where they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from engine.errors import ConfigError
from engine.kernels.matmul.stacked import StackedMatmul
from engine.kernels.operands import Activations
from engine.models.config import ModelConfig
from engine.models.modules import Role
from engine.models.splits import ColumnParallel, Split, row_parallel
from engine.parallel.group import TensorGroup
from engine.parallel.shards import Slices
from engine.quant.lowrank import INNER
from engine.quant.plan import QuantizationPlan
from engine.quant.scheme import Matmul, Scheme, TableMatmul, Tensors
from engine.quant.weight import Weight, stack_rows

ReadWeight = Callable[[str, Slices], Weight]
"""Reads a part of a tensor of the checkpoint by its Hugging Face name."""


class StoredLayer(nn.Module):
    """A module whose buffers are the tensors of a scheme."""

    def _store(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _stored(self) -> Tensors:
        return dict(self.named_buffers(recurse=False))


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices one below the other that are stored alike.

    Attributes:
        sources: Of the layer's.
        prefix: What their tensors' names start with in the layer.
    """

    scheme: Scheme
    sources: slice
    prefix: str

    def of(self, tensors: Tensors) -> Tensors:
        """Its tensors among the layer's."""
        return {
            name.removeprefix(self.prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(self.prefix)
        }

    def named(self, tensors: Tensors) -> Tensors:
        """Its tensors as the layer names them."""
        return {self.prefix + name: tensor for name, tensor in tensors.items()}


class Linear(StoredLayer):
    """y = x Wᵀ + b, where W may stack several matrices of the checkpoint that share their input.

    Args:
        sources: Names of the checkpoint's modules, e.g. those of queries, keys and values of a layer.
        in_features: Of the whole layer, as `sizes`: which part of it is held here, the split says.
        sizes: Output features of each source.
        schemes: That of each source.

    Attributes:
        in_features, out_features, sizes: Of what is held here.
    """

    def __init__(
        self,
        sources: Sequence[str],
        in_features: int,
        sizes: Sequence[int],
        schemes: Sequence[Scheme],
        has_bias: bool,
        split: Split,
    ) -> None:
        super().__init__()
        self.sources, self.has_bias, self.split = tuple(sources), has_bias, split
        columns, rows = split.columns(in_features), [split.rows(size) for size in sizes]
        self.parts = [Slices(part, columns) for part in rows]
        self.sizes = tuple(part.stop - part.start for part in rows)
        self.in_features, self.out_features = columns.stop - columns.start, sum(self.sizes)
        self.stacks = _stacks(schemes)
        for stack in self.stacks:
            rows = sum(self.sizes[stack.sources])
            self._store(stack.named(stack.scheme.storage(rows, self.in_features)))
        if has_bias:
            self._store({"bias": torch.empty(self.out_features, dtype=torch.float32, device="meta")})
        self.matmul: Matmul

    def load(self, read: ReadWeight) -> None:
        read_parts = list(zip(self.sources, self.parts, strict=True))
        for stack in self.stacks:
            weights = (read(f"{source}.weight", part) for source, part in read_parts[stack.sources])
            parts = [
                self._quantize(stack.scheme, source, weight)
                for source, weight in zip(self.sources[stack.sources], weights, strict=True)
            ]
            self._store(stack.named({name: _stack(name, parts) for name in parts[0]}))
        if self.has_bias:
            biases = [read(f"{source}.bias", Slices(part.rows)) for source, part in read_parts]
            assert all(isinstance(bias, torch.Tensor) for bias in biases)
            floats = [bias.float() for bias in biases if isinstance(bias, torch.Tensor)]
            self._store({"bias": torch.cat(floats)})

    def _quantize(self, scheme: Scheme, source: str, weight: Weight) -> Tensors:
        try:
            return self.split.quantize(scheme, weight)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    def randomize(self, device: torch.device) -> None:
        """Random weights, for measurements (`--load-format dummy`)."""
        for stack in self.stacks:
            rows = sum(self.sizes[stack.sources])
            self._store(stack.named(stack.scheme.random(rows, self.in_features, device)))
        if self.has_bias:
            self._store({"bias": torch.zeros(self.out_features, device=device)})

    def bind(self) -> None:
        tensors = self._stored()
        bias = tensors.pop("bias", None)
        sizes = [sum(self.sizes[stack.sources]) for stack in self.stacks]
        biases = [None] * len(sizes) if bias is None else list(torch.split(bias, sizes))
        matmuls = [
            self.split.bind(stack.scheme, stack.of(tensors), part)
            for stack, part in zip(self.stacks, biases, strict=True)
        ]
        self.matmul = matmuls[0] if len(matmuls) == 1 else StackedMatmul(matmuls, sizes)
        # The product holds what it needs, perhaps in an order of its own.
        self._buffers.clear()

    def forward(self, x: Activations) -> torch.Tensor:
        """[M, in_features] → [M, out_features], the outputs of a row-parallel layer all of them."""
        return self.matmul(x)


def _stack(name: str, parts: Sequence[Tensors]) -> torch.Tensor:
    """The tensor of this name of matrices one below the other: that of an inner factor they share."""
    if name.startswith(INNER):
        return parts[0][name]
    return stack_rows([part[name] for part in parts])


def _stacks(schemes: Sequence[Scheme]) -> list[Stack]:
    """Neighbours with the same scheme are stored together."""
    sizes = [(next(run), 1 + len(list(run))) for _, run in groupby(schemes, key=lambda scheme: scheme.name)]
    stacks, start = [], 0
    for number, (scheme, size) in enumerate(sizes):
        prefix = f"stack{number}_" if len(sizes) > 1 else ""
        stacks.append(Stack(scheme, slice(start, start + size), prefix))
        start += size
    return stacks


def build_linear(
    role: Role, layer: str, config: ModelConfig, quantization: QuantizationPlan, group: TensorGroup
) -> Linear:
    """What a rank holds of the projections of a role.

    Args:
        layer: Its name in a checkpoint, like "model.layers.0".

    Raises:
        ConfigError: The projections get schemes whose products cannot be one.
    """
    sources = role.modules(layer)
    schemes = quantization.schemes(sources)
    in_features = role.in_features(config)
    sizes = [projection.out_features(config) for projection in role.projections]
    match role.split:
        case "rows":
            split = row_parallel(group, in_features, sum(sizes), schemes[0])
        case "heads":
            split = ColumnParallel(group, config.head_dim)
        case "columns":
            split = ColumnParallel(group)
    return Linear(sources, in_features, sizes, schemes, role.has_bias(config), split)


class Embedding(nn.Module):
    """Rows of a table by token id, in the activations' dtype, times a factor; the vocabulary is shared by ranks.

    Args:
        source: Name of the checkpoint's module.

    Attributes:
        table: The product with the table's weight, which looks rows up, too: a tied head's is this one.
    """

    def __init__(
        self,
        source: str,
        num_embeddings: int,
        features: int,
        scheme: Scheme,
        dtype: torch.dtype,
        factor: float,
        group: TensorGroup,
    ) -> None:
        super().__init__()
        self.dtype, self.factor, self.group = dtype, factor, group
        self.rows = group.shard.of(num_embeddings)
        self.table = Linear(
            [source], features, [num_embeddings], [scheme], has_bias=False, split=ColumnParallel(group)
        )

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 or int32 → [T, features]."""
        matmul = self.table.matmul
        assert isinstance(matmul, TableMatmul)
        if self.group.size == 1:
            return matmul.rows(token_ids, self.dtype, self.factor)
        local, is_elsewhere = self.group.localize(token_ids, self.rows)
        return self.group.sum_of_one(matmul.rows(local, self.dtype, self.factor), is_elsewhere)
