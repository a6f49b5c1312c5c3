"""Exchanges through memory: in whatever order ranks come, each reads what the others handed over in that turn."""

from __future__ import annotations

import mmap
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from engine.kernels import cpu
from engine.parallel.group import TensorGroup
from engine.parallel.shards import Shard
from engine.parallel.shared_places import PLACE_BYTES, SharedPlaces, share_places

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(cpu.library() is None, reason="there are no C kernels here"),
]

SIZE = 3


def groups() -> list[TensorGroup]:
    """Those of ranks that are threads."""
    memory = mmap.mmap(-1, SharedPlaces.num_bytes(SIZE))
    shares = [Shard(rank, SIZE) for rank in range(SIZE)]
    return [TensorGroup(shard, places=SharedPlaces(memory, shard)) for shard in shares]


def numbers(rank: int, turn: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SIZE * turn + rank))


def test_exchanges_of_all_sizes_by_ranks_that_come_late_in_turn() -> None:
    """The largest take several turns; of 100 columns the last rank has fewer."""
    sizes = [(1, 3), (7, 100), (300, 2000), (1, 100), (0, 30), (64, 48)] * 8
    assert 300 * 2000 * 4 // SIZE > PLACE_BYTES // 2

    def work(group: TensorGroup) -> list[torch.Tensor]:
        rank, found = group.shard.rank, []
        source = random.Random(rank)
        for turn, (rows, width) in enumerate(sizes):
            if source.random() < 0.2:
                time.sleep(0.003 * source.random())
            columns = group.shard.of(width)
            found.append(group.gather(numbers(0, turn, rows, width)[:, columns], width))
            found.append(group.sum_(numbers(rank, turn, rows, width)))
            found.append(group.scatter(numbers(rank, turn, rows, SIZE * width)))
        return found

    with ThreadPoolExecutor(SIZE) as pool:
        results = list(pool.map(work, groups()))
    for turn, (rows, width) in enumerate(sizes):
        inputs = [numbers(rank, turn, rows, width) for rank in range(SIZE)]
        handed = [numbers(rank, turn, rows, SIZE * width).view(SIZE, rows, width) for rank in range(SIZE)]
        for rank, found in enumerate(results):
            gathered, summed, scattered = found[3 * turn : 3 * turn + 3]
            assert torch.equal(gathered, inputs[0])
            assert torch.equal(summed, inputs[0] + inputs[1] + inputs[2])
            assert torch.equal(scattered.view(SIZE, rows, width), torch.stack([one[rank] for one in handed]))


def test_who_waits_in_vain_is_told_so() -> None:
    first, *_ = groups()
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise ConnectionError("the others are gone")

    first.check = check
    with pytest.raises(ConnectionError, match="the others are gone"):
        first.sum_(torch.ones(2, 2))


@pytest.mark.parametrize("last_maps", [True, False])
def test_places_are_shared_by_all_ranks_or_by_none(last_maps: bool) -> None:
    """As if one of them were in a container, where it cannot open what rank 0 has."""
    store = HashStore()
    answers: list[bool] = []

    def all_of(is_so: bool) -> bool:
        answers.append(is_so)
        while len(answers) < SIZE:
            time.sleep(0.001)
        return all(answers) and last_maps

    with ThreadPoolExecutor(SIZE) as pool:
        places = list(pool.map(lambda rank: share_places(store, Shard(rank, SIZE), all_of), range(SIZE)))
    assert answers == [True] * SIZE
    assert [place is not None for place in places] == [last_maps] * SIZE
