"""Place: where a rank stands among all of an engine's, and the groups that it belongs to there.

Ranks are numbered stage by stage: rank = stage * tensor_parallel_size + share.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed
from torch.distributed.distributed_c10d import PrefixStore, Store

from engine.parallel.group import Backend, TensorGroup, join, sums_integers
from engine.parallel.pipeline import Pipeline
from engine.parallel.shards import Shard
from engine.parallel.shared_places import share_places
from engine.parallel.symmetric import OneShotSum, check_reach
from engine.parallel.waiting import WaitRecord
from engine.process import machine_name


@dataclass(frozen=True, slots=True)
class RankPlace:
    """
    Attributes:
        rank, size: Among all ranks.
        group: Those that share its layers.
        pipeline: Its stage.
        everyone: The group of all; None for a single rank.
        num_local: Ranks on this machine, this one included.
    """

    rank: int = 0
    size: int = 1
    group: TensorGroup = field(default_factory=TensorGroup)
    pipeline: Pipeline = field(default_factory=Pipeline)
    everyone: Backend | None = None
    num_local: int = 1

    @property
    def name(self) -> str:
        """Names this rank's share of the weights in the files that keep it; empty for a single rank."""
        if self.size == 1:
            return ""
        shard, exact = self.group.shard, "-exact" if self.group.rank_invariant else ""
        if self.group.rank_invariant and self.group.has_integer_sums:
            exact = "-exact-integers"  # some layers are cut otherwise
        return (
            f"-share-{shard.rank}-of-{shard.size}{exact}-stage-{self.pipeline.stage}-of-{self.pipeline.size}"
        )

    @property
    def tells_what_was_drawn(self) -> bool:
        """Whether it tells rank 0, on the first of several stages, what the last one drew."""
        return self.pipeline.size > 1 and self.pipeline.is_last and self.group.shard.rank == 0

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of all ranks' numbers."""
        if self.everyone is None:
            return number
        options = torch.distributed.AllreduceOptions()
        options.reduceOp = torch.distributed.ReduceOp.MIN  # type: ignore[assignment]
        value = torch.tensor([number], device=device)
        with self.group.record.waiting(_others(self.rank, self.size), "smallest"):
            self.everyone.allreduce([value], options).wait()
            return int(value)


def take_place(
    store: Store | None,
    rank: int,
    tensor_size: int,
    pipeline_size: int,
    device: torch.device,
    rank_invariant: bool,
    is_symmetric: bool = False,
    record: WaitRecord | None = None,
) -> RankPlace:
    """A rank's place; waits until those that it exchanges with are there.

    Args:
        store: Where the ranks find each other; None for a single rank.
        rank_invariant: As in `TensorGroup`.
        is_symmetric: Whether small sums of floats go through symmetric memory.
        record: Says for whom this rank waits, from here on; a new one by default.

    Raises:
        ConfigError: They cannot.
    """
    if store is None:
        return RankPlace()
    record = WaitRecord() if record is None else record
    size = tensor_size * pipeline_size
    stage, shard = divmod(rank, tensor_size)
    group = TensorGroup(Shard(shard, tensor_size), None, rank_invariant, stage=stage, record=record)
    pipeline = Pipeline(stage, pipeline_size, shard=group.shard, record=record)
    with record.waiting(_others(rank, size), "rendezvous"):
        machines = _machines(store, rank, size)
        if tensor_size > 1:
            group.backend = join(store, group.shard, f"stage-{stage}", device)
            # Ranks on several machines may not have the same; their layers must be cut alike.
            group.has_integer_sums = group.all_of(sums_integers(device), device)
            is_local = len(set(machines[stage * tensor_size :][:tensor_size])) == 1
            if device.type == "cpu" and is_local:
                places = PrefixStore(f"places-{stage}", store)
                group.places = share_places(places, group.shard, lambda is_so: group.all_of(is_so, device))
        if pipeline_size > 1:
            pipeline.backend = join(store, Shard(stage, pipeline_size), f"share-{shard}", device)
        if tensor_size > 1 and pipeline_size > 1:
            everyone = join(store, Shard(rank, size), "everyone", device)
        else:
            everyone = group.backend or pipeline.backend
        num_local = machines.count(machines[rank])
        if is_symmetric:
            check_reach(device, num_local, size)
            group.one_shot = OneShotSum(PrefixStore(f"symmetric-{stage}", store), group.shard, device)
        return RankPlace(rank, size, group, pipeline, everyone, num_local)


def _others(rank: int, size: int) -> tuple[int, ...]:
    return tuple(other for other in range(size) if other != rank)


def _machines(store: Store, rank: int, size: int) -> list[str]:
    """The machine of each rank."""
    store.set(f"machine-{rank}", machine_name())
    return [store.get(f"machine-{other}").decode() for other in range(size)]
