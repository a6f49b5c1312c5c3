"""Which share of a model a rank holds: plain numbers, known before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slices:
    """A part of a tensor: of its rows, and of its columns if it is a matrix. None: all."""

    rows: slice | None = None
    columns: slice | None = None


WHOLE = Slices()


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` shares.

    Attributes:
        rank: Which, 0 … size - 1.
    """

    rank: int = 0
    size: int = 1

    def of(self, total: int) -> slice:
        """The part of `total` things; where they do not divide, the last parts are shorter or empty."""
        largest = self.largest(total)
        return slice(min(self.rank * largest, total), min((self.rank + 1) * largest, total))

    def largest(self, total: int) -> int:
        """How many things the first share has."""
        return -(-total // self.size)

    def of_heads(self, num_heads: int, head_dim: int = 1) -> slice:
        """The part of things that come in heads. Where there are fewer heads than shares, each share has one, and
        some have the same one: the KV heads of grouped-query attention.
        """
        heads = self.of(num_heads)
        if num_heads < self.size:
            first = self.rank * num_heads // self.size
            heads = slice(first, first + 1)
        return slice(heads.start * head_dim, heads.stop * head_dim)
