"""TensorGroup: the ranks that hold the shares of one layer, and what they exchange.

Exact whatever the number of ranks: outputs that were computed whole are put together, and sums are of integers, or of
one number and zeros. Ranks on CPUs of one machine exchange through memory (`engine.parallel.shared_places`), others
through gloo or NCCL. While a program is recorded (`engine.kernels.cpu`), an exchange becomes a call of its own in it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed.distributed_c10d import PrefixStore, Store

from engine.kernels import cpu
from engine.parallel.rendezvous import gloo
from engine.parallel.shards import Shard
from engine.parallel.shared_places import PLACE_BYTES, SharedPlaces
from engine.parallel.symmetric import OneShotSum
from engine.parallel.waiting import Kind, Wait, WaitRecord

Backend = Any
"""torch's NCCL or gloo group, of which stubs know only part."""

LOOK = timedelta(seconds=1)
"""How often a rank that waits for the backend asks whether it still should."""

PATIENCE = timedelta(days=1)
"""How long an exchange waits; who does not come is found, and ended, by others (`engine.executor.ranks.ranks`)."""


@dataclass(slots=True)
class TensorGroup:
    """A rank's place among the ranks that share its layers.

    Attributes:
        shard: Of each layer.
        backend: torch's end of it; None for a single rank, and on the meta device.
        rank_invariant: Whether the ranks compute what one would, to the bit (`--exact-reduce`).
        has_integer_sums: Whether products can be summed over ranks as integers, which C's kernels do.
        places: Through which ranks on CPUs of one machine exchange, past the backend.
        one_shot: What sums small floats, if they go past the backend.
        check: Raises if it is in vain to wait for the others; asked where nobody else ends this process.
        stage: The group's, among those of the pipeline.
        record: Says for whom this rank waits.
        others: The group's other ranks, by their numbers among all of the engine.
        num_bytes: What this rank has brought to exchanges, by kind: "gather" or "sum".
        seconds: What exchanges took, waiting for the slowest rank included.
    """

    shard: Shard = field(default_factory=Shard)
    backend: Backend | None = None
    rank_invariant: bool = True
    has_integer_sums: bool = False
    places: SharedPlaces | None = None
    one_shot: OneShotSum | None = None
    check: Callable[[], None] | None = None
    stage: int = 0
    record: WaitRecord = field(default_factory=WaitRecord)
    others: tuple[int, ...] = field(init=False)
    num_bytes: dict[str, int] = field(default_factory=lambda: {"gather": 0, "sum": 0})
    seconds: float = 0.0

    def __post_init__(self) -> None:
        first = self.stage * self.shard.size
        self.others = tuple(first + rank for rank in range(self.shard.size) if rank != self.shard.rank)

    @property
    def size(self) -> int:
        return self.shard.size

    def waiting(self, kind: Kind) -> Wait:
        """A context in which this rank waits for the group's others; every exchange is made in one."""
        return self.record.waiting(self.others, kind)

    def gather(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """Columns [M, share of width] of each rank side by side, [M, width] on all of them."""
        if self.size == 1:
            return x
        whole = _empty_like(x, "gather_columns", width)
        largest, parts = self.shard.largest(width), None
        if not self._has_places(largest * x.itemsize):
            parts = _empty_like(x, "gather_parts", self.size * largest)

        def gather(rows: int) -> None:
            self._gather(x[:rows], None if parts is None else parts[:rows], whole[:rows])

        cpu.call(gather, x.shape[0])
        return whole

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x [M, …] over the ranks, in place."""
        if self.size > 1:
            cpu.call(lambda rows: self._sum(x[:rows]), x.shape[0])
        return x

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sends each rank its part of x [M, size * K], which lies as [size, M, K] for the M rows that there are.

        Returns:
            The parts that the ranks have for this one, one after the other, as they lie in x.
        """
        parts = cpu.empty("scatter", *x.shape, dtype=x.dtype)
        cpu.call(lambda rows: self._scatter(x[:rows], parts[:rows]), x.shape[0])
        return parts

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of the ranks' x, each element by itself; at once, whether a program is recorded or not."""
        if self.size == 1:
            return x
        options = torch.distributed.AllreduceOptions()
        options.reduceOp = torch.distributed.ReduceOp.MAX  # type: ignore[assignment]
        largest = x.clone()
        with self.waiting("largest"):
            self._group.allreduce([largest], options).wait()
        return largest

    def all_of(self, is_so: bool, device: torch.device) -> bool:
        """Whether something is so on all ranks."""
        largest = self.largest(torch.tensor([not is_so], dtype=torch.int32, device=device))
        with self.waiting("largest"):
            return not largest  # is known on a GPU only once the others have come

    def localize(self, token_ids: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Places [T] in this rank's rows of a table, and whether the token's row is another rank's, [T] bool."""
        local, is_elsewhere = torch.zeros_like(token_ids), torch.zeros_like(token_ids, dtype=torch.bool)

        def find(num_tokens: int) -> None:
            ids = token_ids[:num_tokens]
            is_elsewhere[:num_tokens] = (ids < rows.start) | (ids >= rows.stop)
            local[:num_tokens] = (ids - rows.start).masked_fill_(is_elsewhere[:num_tokens], 0)

        cpu.call(find, token_ids.shape[0])
        return local, is_elsewhere

    def sum_of_one(self, x: torch.Tensor, is_elsewhere: torch.Tensor) -> torch.Tensor:
        """x [T, …] of the rank that has each row: the others' are taken as zeros, so that the sum is exact."""

        def add(num_tokens: int) -> None:
            self._sum(x[:num_tokens].masked_fill_(is_elsewhere[:num_tokens, None], 0))

        cpu.call(add, x.shape[0])
        return x

    def _gather(self, x: torch.Tensor, parts: torch.Tensor | None, whole: torch.Tensor) -> None:
        width = self.shard.largest(whole.shape[1])
        mine = torch.nn.functional.pad(x, (0, width - x.shape[1])) if x.shape[1] < width else x.contiguous()
        columns = [Shard(rank, self.size).of(whole.shape[1]) for rank in range(self.size)]
        with self._exchanging("gather", mine):
            if parts is None:
                for rows, pieces in self._exchange(mine):
                    for part, piece in zip(columns, pieces, strict=True):
                        whole[rows, part] = piece[:, : part.stop - part.start]
                return
            self._finish(self._group._allgather_base(parts.view(-1), mine.view(-1)))
        for part, piece in zip(columns, parts.view(self.size, *mine.shape), strict=True):
            whole[:, part] = piece[:, : part.stop - part.start]

    @property
    def _group(self) -> Backend:
        assert self.backend is not None, "a rank without its group holds shapes, not numbers"
        return self.backend

    def _sum(self, x: torch.Tensor) -> None:
        if self.one_shot is not None and self.one_shot.takes(x):
            with self.waiting("one-shot sum"):
                self.one_shot(x)
            return
        with self._exchanging("sum", x):
            if not self._has_places(x.shape[1] * x.itemsize):
                self._finish(self._group.allreduce([x]))
                return
            for rows, pieces in self._exchange(x):
                x[rows] = pieces[0]
                for piece in pieces[1:]:
                    x[rows] += piece

    def _scatter(self, x: torch.Tensor, parts: torch.Tensor) -> None:
        with self._exchanging("scatter", x):
            if not self._has_places(x.shape[1] * x.itemsize):
                self._finish(self._group.alltoall_base(parts.view(-1), x.view(-1), [], []))
                return
            shape = self.size, len(x), x.shape[1] // self.size
            mine, theirs = x.view(shape).transpose(0, 1), parts.view(shape).transpose(0, 1)
            for rows, pieces in self._exchange(mine):
                for rank, piece in enumerate(pieces):
                    theirs[rows, rank] = piece[:, self.shard.rank]

    def _has_places(self, row_bytes: int) -> bool:
        """Whether such rows go through shared memory."""
        return self.places is not None and row_bytes <= PLACE_BYTES

    def _exchange(self, x: torch.Tensor) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        assert self.places is not None
        return self.places.exchange(x, self.check or (lambda: None))

    def _finish(self, work: Any) -> None:
        """Waits for an exchange of the backend; one with a machine that is cut off would not end by itself."""
        if self.check is None:
            work.wait()
            return
        while True:
            try:
                work.wait(LOOK)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises what it failed with
                    return
            try:
                self.check()
            except BaseException:
                # The backend's own end would wait for the exchange, too: it must never come.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.backend))
                raise

    @contextmanager
    def _exchanging(self, kind: Kind, x: torch.Tensor) -> Iterator[None]:
        start = time.perf_counter()
        with self.waiting(kind):
            yield
        self.seconds += time.perf_counter() - start
        self.num_bytes["gather" if kind == "gather" else "sum"] += x.nbytes


def join(store: Store, shard: Shard, name: str, device: torch.device) -> Backend:
    """A rank's end of a group; waits until all its ranks are there.

    Without torch's global process group, which a program that embeds the engine may need for itself.

    Args:
        store: Where the ranks find each other.
        shard: The rank's place in the group.
        name: Of this group, among others that share the store.
    """
    store = PrefixStore(name, store)
    if device.type == "cuda":
        options = torch.distributed.ProcessGroupNCCL.Options()
        return torch.distributed.ProcessGroupNCCL(store, shard.rank, shard.size, options)
    return gloo(store, shard.rank, shard.size, PATIENCE)


def sums_integers(device: torch.device) -> bool:
    """Whether this machine has kernels for products that are summed over ranks as integers."""
    return device.type == "cpu" and cpu.library() is not None


def _empty_like(x: torch.Tensor, owner: str, width: int) -> torch.Tensor:
    if x.device.type == "cpu":
        return cpu.empty(owner, x.shape[0], width, dtype=x.dtype)
    return x.new_empty(x.shape[0], width)
