"""What groups publish of whom a rank waits for: in every exchange, by threads as ranks, whichever way it goes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from engine.kernels import cpu
from engine.parallel.pipeline import waiting_for_device
from engine.parallel.place import RankPlace, take_place
from engine.parallel.waiting import Kind, Waiting, WaitRecord

CPU = torch.device("cpu")


def until(condition: Callable[[], bool]) -> None:
    """Waits for what comes, however slow the machine; only a condition that never comes is given up."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Ranks:
    """An engine's ranks as threads, with what each publishes."""

    def __init__(self, tensor_size: int, pipeline_size: int) -> None:
        size = tensor_size * pipeline_size
        cpu.library()  # is built once, and not by each
        self.pool = ThreadPoolExecutor(size)
        self.records = [WaitRecord() for _ in range(size)]
        store = HashStore()
        started = [
            self.pool.submit(
                take_place, store, rank, tensor_size, pipeline_size, CPU, True, record=self.records[rank]
            )
            for rank in range(size - 1)
        ]
        # All the others meet where the last one is missing.
        for rank in range(size - 1):
            others = tuple(other for other in range(size) if other != rank)
            until(lambda rank=rank, others=others: self.waits(rank) == ("rendezvous", others))
        last = take_place(store, size - 1, tensor_size, pipeline_size, CPU, True, record=self.records[-1])
        self.places: list[RankPlace] = [*(future.result() for future in started), last]

    def waits(self, rank: int) -> tuple[Kind | None, tuple[int, ...]]:
        now = self.records[rank].now
        return now.kind, now.ranks

    def check(
        self,
        waits: dict[int, tuple[Kind, tuple[int, ...]]],
        calls: dict[int, Callable[[RankPlace], object]],
        rest: dict[int, Callable[[RankPlace], object]],
    ) -> None:
        """That those who have called wait as they should until the rest have, and for nobody afterwards."""
        before = [record.now.num_finished for record in self.records]
        began = time.monotonic()
        running: list[Future[object]] = [
            self.pool.submit(call, self.places[rank]) for rank, call in calls.items()
        ]
        for rank, wait in waits.items():
            until(lambda rank=rank, wait=wait: self.waits(rank) == wait)
            assert began <= self.records[rank].now.since <= time.monotonic()
        running += [self.pool.submit(call, self.places[rank]) for rank, call in rest.items()]
        for future in running:
            future.result()
        for rank in (*calls, *rest):
            assert self.waits(rank) == (None, ())
            assert self.records[rank].now.num_finished > before[rank]
            assert self.records[rank].failed is None


@pytest.fixture(scope="module")
def six() -> Iterator[Ranks]:
    """Two stages of three ranks."""
    ranks = Ranks(3, 2)
    yield ranks
    ranks.pool.shutdown()


@pytest.mark.parametrize("way", ["memory", "gloo"])
@pytest.mark.parametrize(
    ("kind", "exchange"),
    [
        ("gather", lambda place: place.group.gather(torch.ones(2, 4), 12)),
        ("sum", lambda place: place.group.sum_(torch.ones(2, 4))),
        ("scatter", lambda place: place.group.scatter(torch.ones(2, 12))),
        ("largest", lambda place: place.group.all_of(True, CPU)),
    ],
)
def test_who_exchanges_in_a_group_says_so(
    way: str, kind: Kind, exchange: Callable[[RankPlace], object], six: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second stage, whose ranks are 3, 4 and 5 among all of the engine."""
    if way == "gloo":
        for place in six.places:
            monkeypatch.setattr(place.group, "places", None)
    elif cpu.library() is None:
        pytest.skip("there are no C kernels here")
    else:
        assert all(place.group.places is not None for place in six.places)
    waits: dict[int, tuple[Kind, tuple[int, ...]]] = {3: (kind, (4, 5)), 5: (kind, (3, 4))}
    six.check(waits, {3: exchange, 5: exchange}, {4: exchange})


def test_what_sums_past_the_group_is_recorded_like_the_rest(
    six: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symmetric memory needs GPUs: something else is in its place, at the same call."""
    arrived = threading.Barrier(3)

    class OneShot:
        def takes(self, x: torch.Tensor) -> bool:
            return x.nbytes == 32

        def __call__(self, x: torch.Tensor) -> None:
            arrived.wait()

    for place in six.places:
        monkeypatch.setattr(place.group, "one_shot", OneShot())

    def add(place: RankPlace) -> object:
        return place.group.sum_(torch.ones(2, 4))

    six.check({1: ("one-shot sum", (0, 2)), 2: ("one-shot sum", (0, 1))}, {1: add, 2: add}, {0: add})


def test_a_stage_says_that_it_waits_for_the_one_before(six: Ranks) -> None:
    x = torch.randn(3, 8)
    got = []

    def receive(place: RankPlace) -> None:
        got.append(place.pipeline.receive(x, 3, 8, torch.float32))

    six.check({4: ("receive", (1,))}, {4: receive}, {1: lambda place: place.pipeline.send(x)})
    assert torch.equal(got[0], x)


def test_a_stage_that_is_ahead_says_that_it_waits_for_the_one_after(six: Ranks) -> None:
    """What it sends is more than lies on the way."""
    shape = 1024, 1024

    def send(place: RankPlace) -> None:
        place.pipeline.send(torch.zeros(shape))
        place.pipeline.send(torch.zeros(shape))

    def receive(place: RankPlace) -> None:
        for _ in range(2):
            place.pipeline.receive(torch.empty(0), *shape, torch.float32)

    six.check({2: ("send", (5,))}, {2: send}, {5: receive})


def test_all_ranks_agree_on_a_number_and_wait_for_all(six: Ranks) -> None:
    calls = {rank: lambda place: place.smallest(7 + place.rank, CPU) for rank in range(6)}
    rest = {3: calls.pop(3)}
    six.check({rank: ("smallest", tuple({*range(6)} - {rank})) for rank in calls}, calls, rest)


def test_who_waits_for_a_device_waits_for_all_with_whom_that_exchanges() -> None:
    ranks = Ranks(2, 3)
    for rank, others in enumerate(((1, 2), (0, 3), (3, 0, 4), (2, 1, 5), (5, 2), (4, 3))):
        place = ranks.places[rank]
        with waiting_for_device(place.group, place.pipeline):
            assert ranks.waits(rank) == ("device", others)
        assert ranks.waits(rank) == (None, ())
    ranks.pool.shutdown()


def test_waits_nest_and_end_with_errors() -> None:
    record = WaitRecord()
    assert record.now == Waiting()
    with record.waiting((1, 2), "rendezvous"):
        outer = record.now
        with record.waiting((2,), "largest"):
            assert (record.now.ranks, record.now.kind, record.now.num_finished) == ((2,), "largest", 0)
            assert record.now.since >= outer.since
        assert record.now == Waiting((1, 2), "rendezvous", outer.since, 1)
        with pytest.raises(ConnectionError), record.waiting((1,), "send"):
            raise ConnectionError
        assert record.now == Waiting((1, 2), "rendezvous", outer.since, 1)
    assert record.now == Waiting(num_finished=2)
    # The first cause counts, not those that follow from it.
    with pytest.raises(ConnectionError), record.waiting((3,), "sum"):
        raise ConnectionError
    assert record.failed == "send"
    assert record.now == Waiting(num_finished=2)


def test_readers_see_one_wait_and_never_parts_of_two() -> None:
    """Read after every instruction of the writer: where another thread may come in between."""
    record, seen = WaitRecord(), [Waiting()]

    def trace(frame: FrameType, event: str, argument: object) -> object:
        frame.f_trace_opcodes = True
        sys.settrace(None)
        if record.now != seen[-1]:
            seen.append(record.now)
        sys.settrace(trace)
        return trace

    def write() -> None:
        with record.waiting((1, 2), "gather"):
            with record.waiting((3,), "send"):
                pass
            with contextlib.suppress(ConnectionError), record.waiting((4, 5), "sum"):
                raise ConnectionError

    before = sys.gettrace()
    sys.settrace(trace)
    write()
    sys.settrace(before)
    outer, inner, last = seen[1].since, seen[2].since, seen[4].since
    assert 0 < outer <= inner <= last
    assert seen == [
        Waiting(),
        Waiting((1, 2), "gather", outer, 0),
        Waiting((3,), "send", inner, 0),
        Waiting((1, 2), "gather", outer, 1),
        Waiting((4, 5), "sum", last, 1),
        Waiting((1, 2), "gather", outer, 1),
        Waiting((), None, 0.0, 2),
    ]
