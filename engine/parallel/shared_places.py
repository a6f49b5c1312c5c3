"""SharedPlaces: how ranks on CPUs of one machine exchange, through memory that all have mapped.

An exchange costs microseconds where gloo, which goes through the kernel's sockets and threads of its own, takes
hundreds. The memory has no name: it goes with the processes. How they take turns: `engine/kernels/cpu/exchange.c`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator

import torch
from torch.distributed.distributed_c10d import Store

from engine.kernels import cpu
from engine.parallel.shards import Shard

PLACE_BYTES = 2**20
"""What a rank hands over at a time."""

COUNTER_BYTES = 64

NAPS = 1000
"""Naps of 50 µs after which a rank that waits asks whether it still should."""


class SharedPlaces:
    """A rank's view of the memory.

    Args:
        memory: That all have mapped.
    """

    def __init__(self, memory: mmap.mmap, shard: Shard) -> None:
        self._share, self._turn = shard, 0
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        loaded = cpu.library()
        assert loaded is not None
        self._begin, self._await = loaded.functions.begin_turn, loaded.functions.await_turn

    @staticmethod
    def num_bytes(size: int) -> int:
        """Bytes of the memory that so many ranks share."""
        return size * (COUNTER_BYTES + 2 * PLACE_BYTES)

    def exchange(
        self, x: torch.Tensor, check: Callable[[], None]
    ) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Hands x [M, …] over in pieces of some rows, of which one must fit into PLACE_BYTES.

        Args:
            check: Raises if it is in vain to wait for the others.

        Yields:
            Which rows, and what each rank has there: [rows, …], to be read before the next piece is asked for.
        """
        num_rows = PLACE_BYTES // x[:1].nbytes if len(x) else 1
        for start in range(0, len(x), num_rows):
            rows = slice(start, min(start + num_rows, len(x)))
            piece = x[rows]
            self._turn += 1
            places = [self._place(rank, piece) for rank in range(self._share.size)]
            places[self._share.rank].copy_(piece)
            self._begin(self._memory.data_ptr(), self._share.rank, self._turn)
            while not self._await(self._memory.data_ptr(), self._share.size, self._turn, NAPS):
                check()
            yield rows, places

    def _place(self, rank: int, like: torch.Tensor) -> torch.Tensor:
        start = self._share.size * COUNTER_BYTES + (2 * rank + self._turn % 2) * PLACE_BYTES
        return self._memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def share_places(store: Store, shard: Shard, all_of: Callable[[bool], bool]) -> SharedPlaces | None:
    """The places of a group of ranks on one machine; None where one of them cannot map the memory.

    Args:
        store: Where they find each other.
        all_of: Whether something is so on all of them.
    """
    num_bytes = SharedPlaces.num_bytes(shard.size)
    handle = None
    if shard.rank == 0:
        handle = _anonymous_file(num_bytes)
        store.set("memory", "" if handle is None else f"/proc/{os.getpid()}/fd/{handle}")
    try:
        with open(store.get("memory").decode(), "r+b") as file:
            memory = mmap.mmap(file.fileno(), num_bytes)
    except OSError:
        memory = None
    try:
        if not all_of(memory is not None and cpu.library() is not None):
            return None
    finally:
        if handle is not None:
            os.close(handle)
    assert memory is not None
    return SharedPlaces(memory, shard)


def _anonymous_file(num_bytes: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    handle = os.memfd_create("llm-engine")
    os.ftruncate(handle, num_bytes)
    return handle
