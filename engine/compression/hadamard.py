"""Rotations: an orthogonal Q spreads outliers over all channels, and undoes itself: (x Q) (W Q)ᵀ = x Wᵀ.

    Q = diag(signs) · (H ⊗ F)        n = 2ᵏ · m, H the Sylvester-Hadamard matrix of 2ᵏ over its root, F [m, m]

F is a Hadamard matrix over its root where Paley's constructions give one, so that all entries of Q are ±n^-½;
otherwise the cosine transform of n's odd part. The random signs make Q differ from what a model may have learnt.
Rotating a model's residual stream changes no output (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4;
SpinQuant, Liu et al. 2024, arXiv:2405.16406), as RMSNorm without its weight commutes with Q. All functions compute
in float32 or float64 and return that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.compression.gptq import widen
from engine.models.modules import NORMS, ROLES, readers

MAX_FACTOR = 512
"""Largest F: a product with it takes n · m multiplications."""

READERS = {
    norm: tuple(projection.short for role in readers(norm) for projection in role.projections)
    for norm in NORMS
}
"""The norms of a layer, and the weights that read what they return."""

WRITERS = tuple(projection.short for role in ROLES if role.split == "rows" for projection in role.projections)
"""The weights of a layer whose outputs are added to the residual stream."""

UNTOUCHED = ("q_norm", "k_norm", *(f"{reader}_bias" for behind in READERS.values() for reader in behind))
"""What belongs to a layer and lies off the residual stream."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """A randomized orthogonal transform of n channels.

    Attributes:
        signs: [n] float64, each 1 or -1.
        factor: [m, m] float64, orthogonal; n / m is a power of two.
    """

    signs: torch.Tensor
    factor: torch.Tensor

    @property
    def width(self) -> int:
        return len(self.signs)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x Q along the last dimension, [..., n] → [..., n]; O(n (log n + m)) for each row."""
        x = widen(x)
        return self._transform(x * self.signs.to(x), self.factor.to(x))

    def invert(self, x: torch.Tensor) -> torch.Tensor:
        """x Qᵀ along the last dimension, which undoes `apply`."""
        x = widen(x)
        return self._transform(x, self.factor.t().to(x)) * self.signs.to(x)

    def matrix(self) -> torch.Tensor:
        """Q, [n, n] float64."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))

    def _transform(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """x (H ⊗ F)."""
        size = len(factor)
        power = self.width // size
        shape = x.shape
        half = 1
        while half < power:
            first, second = x.reshape(-1, power // (2 * half), 2, half * size).unbind(2)
            x = torch.stack((first + second, first - second), dim=2)
            half *= 2
        return (x.reshape(-1, power, size) @ (factor * power**-0.5)).view(shape)


def make_rotation(width: int, seed: int) -> Rotation:
    """The rotation of `width` channels, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return Rotation(signs, _factor(width))


def rotate_inputs(weight: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """W Q [N, K], for a weight whose inputs come as x Q."""
    return rotation.apply(weight)


def rotate_outputs(weight: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Qᵀ W [N, K], for a weight whose outputs are to be y Q; a bias [N] is rotated by `Rotation.apply`."""
    return rotation.apply(weight.t()).t().contiguous()


def fold_norm(
    norm: torch.Tensor, readers: Sequence[torch.Tensor], offset: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A norm's weight [K] moved into the weights [N, K] that read what it returns.

    Args:
        norm: As stored.
        offset: What is added to the stored weight: 1 for Gemma's norms, else 0.

    Returns:
        The weight that scales by 1, as it is to be stored, and the readers.
    """
    norm = widen(norm)
    folded = [widen(reader) for reader in readers]
    return torch.full_like(norm, 1 - offset), [reader * (norm + offset).to(reader.dtype) for reader in folded]


def rotate_layer(
    tensors: Mapping[str, torch.Tensor], rotation: Rotation, norm_offset: float
) -> dict[str, torch.Tensor]:
    """A layer that reads and adds to the residual stream x Q as the given one does to x.

    The norms' weights are folded into the weights that read them, q, k, v, gate and up, whose input side is then
    rotated; o and down get their output side rotated, and their biases. What attention and the MLP do in between
    is unchanged.

    Args:
        tensors: By role: "attention_norm", "mlp_norm" [K]; "q", "k", "v", "gate", "up" [N, K]; "o", "down" [K, N];
            biases "q_bias", ..., and "q_norm", "k_norm" of queries and keys where the layer has them.
        norm_offset: What is added to the stored weights of norms.

    Raises:
        ValueError: A role that is not known: a norm between o or down and the residual sum does not commute with
            a rotation.
    """
    rotated = {}
    for name, behind in READERS.items():
        rotated[name], folded = fold_norm(tensors[name], [tensors[reader] for reader in behind], norm_offset)
        for reader, weight in zip(behind, folded, strict=True):
            rotated[reader] = rotate_inputs(weight, rotation)
    for writer in WRITERS:
        rotated[writer] = rotate_outputs(tensors[writer], rotation)
        if f"{writer}_bias" in tensors:
            rotated[f"{writer}_bias"] = rotation.apply(tensors[f"{writer}_bias"])
    rotated |= {name: tensors[name] for name in UNTOUCHED if name in tensors}
    if unknown := sorted(tensors.keys() - rotated.keys()):
        raise ValueError(f"rotation: a layer with {', '.join(unknown)} cannot be rotated; leave rotation out")
    return rotated


def rotate_ends(
    embedding: torch.Tensor, norm: torch.Tensor, head: torch.Tensor, rotation: Rotation, norm_offset: float
) -> dict[str, torch.Tensor]:
    """Embedding, last norm and head around rotated layers, as "embedding", "norm" and "head".

    The norm's weight goes into the head alone: a head that was tied to the embedding no longer is.

    Args:
        embedding: [V, K].
        norm: [K], as stored.
        head: [V, K], the embedding itself where they are tied.
    """
    norm, (folded,) = fold_norm(norm, [head], norm_offset)
    return {
        "embedding": rotation.apply(embedding),
        "norm": norm,
        "head": rotate_inputs(folded, rotation),
    }


def _factor(width: int) -> torch.Tensor:
    """F for a width: the smallest Hadamard matrix that leaves a power of two, or the odd part's cosines."""
    odd = width
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    size = 4 * odd
    while width % size == 0 and size <= MAX_FACTOR:
        matrix = _paley(size)
        if matrix is not None:
            return matrix * size**-0.5
        size *= 2
    return _cosines(odd)


def _paley(size: int) -> torch.Tensor | None:
    """A Hadamard matrix [size, size] of ±1 (Paley 1933), or None; `size` is a multiple of 4."""
    prime = size - 1
    if _is_prime(prime):
        # The first construction: I + S, S skew, for a prime that is 3 modulo 4.
        matrix = torch.eye(size, dtype=torch.float64)
        matrix[0, 1:] = 1
        matrix[1:, 0] = -1
        matrix[1:, 1:] += _characters(prime)
        return matrix
    prime = size // 2 - 1
    if prime % 4 == 1 and _is_prime(prime):
        # The second: C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]], C symmetric, for a prime that is 1 modulo 4.
        conference = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
        conference[0, 1:] = conference[1:, 0] = 1
        conference[1:, 1:] = _characters(prime)
        identity = torch.eye(prime + 1, dtype=torch.float64)
        return torch.kron(
            conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        ) + torch.kron(identity, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64))
    return None


def _characters(prime: int) -> torch.Tensor:
    """χ(i - j) [prime, prime]: 1 where the difference is a square modulo the prime, -1 where not, 0 for i = j."""
    character = torch.full((prime,), -1, dtype=torch.float64)
    numbers = torch.arange(prime)
    character[numbers**2 % prime] = 1
    character[0] = 0
    return character[(numbers[:, None] - numbers) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _cosines(size: int) -> torch.Tensor:
    """The orthogonal cosine transform (DCT-II), [size, size]."""
    numbers = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (numbers + 0.5) * numbers[:, None]) * (2 / size) ** 0.5
    matrix[0] *= 0.5**0.5
    return matrix
