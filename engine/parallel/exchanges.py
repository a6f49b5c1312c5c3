"""Exchanges: what ranks hand to each other in a step, and its bytes, as arithmetic.

Bytes are those that a rank hands over, which `TensorGroup.num_bytes` and `Pipeline.num_bytes` count. What crosses a
link for them depends on who carries them out: a ring sends each of size - 1 others' parts of a gather on, and
2 (size - 1) / size of a sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from engine.parallel.shards import Shard


@dataclass(frozen=True, slots=True)
class Exchange:
    """One exchange, made `count` times in a step.

    Attributes:
        name: What is exchanged.
        of: Whether of every token, or of those rows only that draw one.
        row_bytes: That a rank hands over of each.
    """

    name: str
    kind: Literal["gather", "sum", "send"]
    of: Literal["token", "draw"]
    row_bytes: int
    count: int = 1

    def num_bytes(self, num_tokens: int, num_draws: int) -> int:
        """Bytes that a rank hands over in a step of so many tokens, of which so many draw."""
        return self.count * self.row_bytes * (num_tokens if self.of == "token" else num_draws)


def gathered(
    name: str, width: int, size: int, itemsize: int, of: Literal["token", "draw"] = "token"
) -> Exchange:
    """The exchange that puts `width` numbers together, of which ranks have shares, padded to the largest."""
    return Exchange(name, "gather", of, Shard(0, size).largest(width) * itemsize)


def summed(name: str, width: int, itemsize: int) -> Exchange:
    return Exchange(name, "sum", "token", width * itemsize)


def sent(name: str, width: int, itemsize: int) -> Exchange:
    """What goes from a stage to the next."""
    return Exchange(name, "send", "token", width * itemsize)


def counted(exchanges: Iterable[Exchange]) -> list[Exchange]:
    """Exchanges of which equal ones have become one that is made so many times."""
    counts: dict[Exchange, int] = {}
    for exchange in exchanges:
        counts[exchange] = counts.get(exchange, 0) + exchange.count
    return [
        Exchange(exchange.name, exchange.kind, exchange.of, exchange.row_bytes, count)
        for exchange, count in counts.items()
    ]


def step_bytes(exchanges: Iterable[Exchange], num_tokens: int, num_draws: int) -> dict[str, int]:
    """Bytes that a rank hands over in a step, by kind of exchange."""
    total: dict[str, int] = {}
    for exchange in exchanges:
        total[exchange.kind] = total.get(exchange.kind, 0) + exchange.num_bytes(num_tokens, num_draws)
    return total
