"""The order among those who wait: priorities that do not starve, owners who share; what it costs where many do."""

from __future__ import annotations

import random
from collections import Counter, UserDict

import pytest

from engine.core.batch import Batch
from engine.core.fair_share import MAX_ABSENT, FairShare
from engine.core.request import Request, SampledToken, Sequence, SequenceStatus
from engine.core.sampling_params import SamplingParams
from engine.core.scheduler import Scheduler
from engine.core.waiting import MAX_PASSED, WaitingQueue
from tests.core.test_scheduler import make_scheduler, step

PROMPT = 8
OUTPUT = 12


def make_request(name: str, owner: str = "", priority: int = 0, num_tokens: int = PROMPT) -> Request:
    """One whose prompt shares no block with others."""
    return Request(
        request_id=name,
        prompt_token_ids=[hash((name, i)) % 2**31 for i in range(num_tokens)],
        params=SamplingParams(max_tokens=OUTPUT, ignore_eos=True),
        seed=0,
        priority=priority,
        owner=owner,
    )


def owners_of(scheduler: Scheduler, batch: Batch) -> Counter[str]:
    """Tokens of each owner in a step that is planned: the rows' sequences are found by their slots."""
    by_slot = {sequence.slot: sequence.owner for sequence in scheduler.running}
    return Counter(
        {owner: sum(len(r.token_ids) for r in batch.rows if by_slot.get(r.slot) == owner) for owner in "ab"}
    )


def steps_to_first_token(scheduler: Scheduler, request: Request) -> int:
    scheduler.add(request)
    for number in range(1, 10_000):
        _, outputs = step(scheduler)
        if any(output.request_id == request.request_id for output in outputs):
            return number
    raise AssertionError("it never came")


def test_who_floods_takes_nothing_from_who_sends_rarely() -> None:
    """It waits for the next place that gets free, as it would if each other place were another one's."""
    scheduler = make_scheduler(num_blocks=256, max_num_seqs=4)
    for index in range(300):
        scheduler.add(make_request(f"flood {index}", "flood"))
    step(scheduler)
    waits = []
    for index in range(20):
        for _ in range(OUTPUT):
            step(scheduler)
        waits.append(steps_to_first_token(scheduler, make_request(f"rare {index}", "rare")))
    assert max(waits) <= OUTPUT + 1
    assert scheduler.stats.num_requests_waiting > 100


def test_owners_with_much_to_do_are_served_evenly() -> None:
    """One sends few long prompts, the other many short ones; neither gets ahead by more than what is in the batch."""
    scheduler = make_scheduler(num_blocks=512, max_num_batched_tokens=32, max_num_seqs=4, threshold=16)
    for index in range(40):
        scheduler.add(make_request(f"a{index}", "a", num_tokens=60))
        for part in range(6):
            scheduler.add(make_request(f"b{index}/{part}", "b", num_tokens=4))
    served: Counter[str] = Counter()
    batch_bound = 4 * (60 + OUTPUT)
    num_steps = 0
    while {sequence.owner for sequences in scheduler.requests.values() for sequence in sequences} == {
        "a",
        "b",
    }:
        batch = scheduler.schedule()
        served += owners_of(scheduler, batch)
        scheduler.update([SampledToken(1) if row.draw else None for row in batch.rows])
        num_steps += 1
        assert abs(served["a"] - served["b"]) <= batch_bound
    assert num_steps > 100


def test_who_comes_back_has_saved_nothing_up() -> None:
    shares = FairShare()
    for owner in ("old", "new", "new"):
        shares.enter(owner)
    shares.charge("new", 5)
    shares.charge("old", 1000)
    shares.leave("new")
    shares.leave("new")
    shares.charge("old", 1000)
    shares.enter("new")
    assert shares.served == {"old": 2000, "new": 2000}
    # Nor is forgotten what one had too much.
    shares.charge("new", 500)
    shares.leave("new")
    shares.enter("new")
    assert shares.served == {"old": 2000, "new": 2500}
    for owner in ("old", "new"):
        shares.leave(owner)
    assert shares.served == {}


def test_owners_who_are_gone_are_forgotten() -> None:
    shares = FairShare()
    shares.enter("stays")
    for index in range(10 * MAX_ABSENT):
        shares.enter(str(index))
        shares.charge(str(index), 1)
        shares.leave(str(index))
        assert max(len(shares.served), len(shares._least), len(shares._listed)) <= MAX_ABSENT + 4


def test_memory_that_runs_out_is_taken_from_who_has_most() -> None:
    """The one that sends rarely came last, and stays."""
    scheduler = make_scheduler(num_blocks=16, max_num_seqs=8)
    for index in range(6):
        scheduler.add(make_request(f"flood {index}", "flood"))
    step(scheduler)
    scheduler.add(make_request("rare", "rare"))
    finished: list[str] = []
    while "rare" not in finished:
        finished += [output.request_id for output in step(scheduler)[1] if output.finish_reason]
        (rare,) = scheduler.requests.get("rare", [None])
        assert rare is None or rare.num_output_tokens == 0 or rare.status is SequenceStatus.RUNNING
    assert scheduler.stats.num_preemptions > 0


@pytest.mark.parametrize("priority", [1, 10**9])
def test_a_priority_that_others_go_before_does_not_starve(priority: int) -> None:
    scheduler = make_scheduler(num_blocks=256, max_num_seqs=1)
    scheduler.add(make_request("late", priority=priority))
    arrivals = admitted = 0
    while not (late := scheduler.requests["late"][0]).num_output_tokens:
        # Two are always there that go before it.
        while scheduler.stats.num_requests_waiting < 3:
            scheduler.add(make_request(f"{arrivals}"))
            arrivals += 1
        before = {sequence.request.request_id for sequence in scheduler.running}
        step(scheduler)
        admitted += len({sequence.request.request_id for sequence in scheduler.running} - before)
    assert admitted == MAX_PASSED + 1
    # Nobody of those that it went before takes its place.
    assert late.priority == 0


def test_smaller_priorities_go_first_but_for_one_in_so_many() -> None:
    scheduler = make_scheduler(num_blocks=256, max_num_seqs=1)
    given = [2] * 5 + [1] * 5 + [0] * 40
    for index, priority in enumerate(given):
        scheduler.add(make_request(f"{index}", priority=priority))
    order: list[int] = []
    while scheduler.has_work:
        order += [given[int(output.request_id)] for output in step(scheduler)[1] if output.finish_reason]
    turns = {number: one for number, one in enumerate(order) if one > min(order[number:])}
    assert turns == {MAX_PASSED: 2, 2 * MAX_PASSED + 1: 1}


class CountedSequence(Sequence):
    """Counts how often a queue looks at it."""

    num_reads = 0

    @property
    def status(self) -> SequenceStatus:
        CountedSequence.num_reads += 1
        return self.known

    @status.setter
    def status(self, status: SequenceStatus) -> None:
        self.known = status


class CountedShares(UserDict[str, int]):
    """Counts how often a queue asks for what an owner was served."""

    num_reads = 0

    def get(self, owner: str, default: int = 0) -> int:  # type: ignore[override]
        self.num_reads += 1
        return self.data.get(owner, default)


def sequences_of(num: int, num_owners: int = 1, num_priorities: int = 1) -> list[CountedSequence]:
    return [
        CountedSequence(make_request(str(i), str(i % num_owners), i % num_priorities), 0, i, b"")
        for i in range(num)
    ]


def num_entries(queue: WaitingQueue) -> int:
    return sum(len(line) for level in queue._levels.values() for line in level.lines.values())


@pytest.mark.parametrize(("num_owners", "num_priorities"), [(1, 1), (1000, 1), (1, 1000), (50, 20)])
def test_the_end_of_one_costs_no_more_where_many_wait(num_owners: int, num_priorities: int) -> None:
    queue = WaitingQueue({})
    sequences = sequences_of(4000, num_owners, num_priorities)
    for sequence in sequences:
        queue.push(sequence)
    for _ in range(1000):
        queue.first()
        queue.park("a block")
    CountedSequence.num_reads = 0
    for number, sequence in enumerate(random.Random(0).sample(sequences, len(sequences))):
        sequence.status = SequenceStatus.FINISHED
        queue.end(sequence)
        assert len(queue) == len(sequences) - number - 1
        assert num_entries(queue) <= 2 * len(queue) + 1
    assert CountedSequence.num_reads <= 2 * len(sequences)
    queue.release("a block")
    assert queue.first() is None


@pytest.mark.parametrize(("num_owners", "num_priorities"), [(1, 1), (2000, 1), (1, 2000), (64, 64)])
def test_an_admission_costs_no_more_where_many_wait(num_owners: int, num_priorities: int) -> None:
    """Whoever is admitted is served, so that an owner's place in the order changes each time."""
    shares = CountedShares()
    queue = WaitingQueue(shares)
    sequences = sequences_of(4000, num_owners, num_priorities)
    for sequence in sequences:
        queue.push(sequence)
    CountedSequence.num_reads = shares.num_reads = 0
    served: Counter[str] = Counter()
    for _ in sequences:
        sequence = queue.first()
        assert sequence is not None
        queue.pop()
        served[sequence.owner] += 1
        shares[sequence.owner] = shares.get(sequence.owner) + 1
        if num_priorities == 1:
            assert max(served.values()) - min(served[str(owner)] for owner in range(num_owners)) <= 1
    assert len(queue) == 0
    assert CountedSequence.num_reads <= 8 * len(sequences)
    assert shares.num_reads <= 8 * len(sequences)


def test_levels_that_come_and_go_leave_nothing_behind() -> None:
    queue = WaitingQueue({})
    stays, *others = sequences_of(2000, 1, 2000)
    queue.push(stays)
    for sequence in others:
        queue.push(sequence)
        sequence.status = SequenceStatus.FINISHED
        queue.end(sequence)
        assert queue.first() is stays
        assert max(len(queue._levels), len(queue._priorities)) <= 3
