"""Sums of floats over the GPUs of one machine through torch's symmetric memory (`--symmetric-memory`).

Each rank reads all others' numbers by itself, in one kernel that a CUDA graph can hold: (n - 1) * bytes over its
links, where a ring sends 2 (n - 1) / n * bytes in 2 (n - 1) turns. The sums of a decode step are so small that the
turns are what they take; larger ones are left to NCCL.

No machine has run this yet: it is off by default.
"""

from __future__ import annotations

import uuid

import torch
from torch._C._distributed_c10d import _SymmetricMemory
from torch.distributed.distributed_c10d import Store

from engine.errors import ConfigError
from engine.parallel.shards import Shard

MAX_BYTES = 512 * 1024
"""The largest sum that is made so. Not measured: vLLM's custom all-reduce leaves its one-shot kernel here with 4
GPUs, at half with 8."""


class OneShotSum:
    """Sums a tensor over ranks, each of which calls it with its own in the same order.

    Args:
        store: Where the ranks find each other.
        shard: The rank's place among them.
    """

    def __init__(self, store: Store, shard: Shard, device: torch.device) -> None:
        import torch.distributed._symmetric_memory  # registers torch.ops.symm_mem

        # torch keeps groups by name for the process, which may have had another engine.
        self._name = str(uuid.uuid4())
        _SymmetricMemory.set_group_info(self._name, shard.rank, shard.size, store)
        self._buffer = _SymmetricMemory.empty_strided_p2p((MAX_BYTES,), (1,), torch.uint8, device, self._name)
        # Is kept: the others' mappings live as long as it does.
        self._memory = _SymmetricMemory.rendezvous(self._buffer, self._name)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether it can sum x: kernels read 16 bytes at a time."""
        is_float = x.dtype in (torch.float32, torch.bfloat16)
        return is_float and x.is_contiguous() and x.nbytes <= MAX_BYTES and x.nbytes % 16 == 0

    def __call__(self, x: torch.Tensor) -> None:
        """Sums x in place."""
        mine = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        mine.copy_(x)
        torch.ops.symm_mem.one_shot_all_reduce_out(mine, "sum", self._name, x)


def check_device(device: torch.device) -> None:
    """
    Raises:
        ConfigError: It has no such memory.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"symmetric_memory: is for GPUs, not for {device.type}; leave --symmetric-memory out"
        )


def check_reach(device: torch.device, num_local: int, size: int) -> None:
    """
    Args:
        num_local: How many of the `size` ranks are on this machine.

    Raises:
        ConfigError: The ranks' GPUs cannot read each other's memory.
    """
    if num_local < size:
        raise ConfigError("symmetric_memory: is for GPUs of one machine; leave --symmetric-memory out")
    others = (other for other in range(torch.cuda.device_count()) if other != device.index)
    apart = [str(other) for other in others if not torch.cuda.can_device_access_peer(device, other)]
    if apart:
        raise ConfigError(
            f"symmetric_memory: GPU {device.index} cannot read the memory of GPU {', '.join(apart)}; "
            "leave --symmetric-memory out"
        )
