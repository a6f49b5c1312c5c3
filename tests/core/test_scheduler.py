"""The scheduler, run without a model: the test plays the runner and draws the tokens."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import SchedulerConfig
from engine.core.batch import Batch, BatchRow
from engine.core.grammar import Grammars
from engine.core.kv_cache import BlockPool, KVCacheManager
from engine.core.pace import MIN_PROMPT_TOKENS
from engine.core.request import (
    EngineOutput,
    PromptLogprobs,
    Request,
    RowFailure,
    RowResult,
    SampledToken,
    ScoredPrompt,
    Sequence,
    SequenceStatus,
)
from engine.core.sampling_params import SamplingParams
from engine.core.scheduler import MAX_HASHED_TOKENS, Scheduler
from engine.core.step_costs import StepCosts
from tests.core.test_kv_cache import free_list

EOS = 7
BLOCK_SIZE = 4


def make_scheduler(
    num_blocks: int = 64,
    max_num_batched_tokens: int = 32,
    max_num_seqs: int = 16,
    threshold: int = 16,
    enable_prefix_caching: bool = True,
) -> Scheduler:
    config = SchedulerConfig(
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        long_prefill_token_threshold=threshold,
        max_model_len=num_blocks * BLOCK_SIZE,
    )
    cache = KVCacheManager(BlockPool(num_blocks + 1), BLOCK_SIZE)
    return Scheduler(config, cache, [EOS], b"salt", enable_prefix_caching, Grammars(320, [EOS]))


def make_request(request_id: str, prompt: list[int], priority: int = 0, **params: object) -> Request:
    params.setdefault("max_tokens", 8)
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(**params),  # type: ignore[arg-type]
        seed=0,
        priority=priority,
    )


def step(scheduler: Scheduler, token_id: int = 1) -> tuple[Batch, list[EngineOutput]]:
    batch = scheduler.schedule()
    check_plan(scheduler, batch)
    return batch, scheduler.update([SampledToken(token_id) if row.draw else None for row in batch.rows])


def result_of(row: BatchRow, token_id: int) -> RowResult:
    """What a runner would bring."""
    token = SampledToken(token_id) if row.draw else None
    if row.scoring is None:
        return token
    count = len(row.scoring.token_ids)
    assert 0 <= row.scoring.first <= len(row.token_ids) - count
    return ScoredPrompt(
        PromptLogprobs(
            row.scoring.start, row.scoring.token_ids, bytes(4 * count), bytes(4 * count), b"", b""
        ),
        token,
    )


def check_plan(scheduler: Scheduler, batch: Batch) -> None:
    """What holds of every plan."""
    assert 0 < batch.num_tokens <= scheduler.config.max_num_batched_tokens
    assert len(batch.rows) <= scheduler.config.max_num_seqs
    for row in batch.rows:
        end = row.start + len(row.token_ids)
        assert row.token_ids
        assert len(row.block_table) * BLOCK_SIZE >= end
        assert 0 not in row.block_table


def prompt_of(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


def sizes(batch: Batch) -> list[int]:
    return [len(row.token_ids) for row in batch.rows]


def test_a_prompt_is_chunked_then_decoded() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(make_request("a", prompt_of(40)))
    plans = [sizes(step(scheduler)[0]) for _ in range(5)]
    assert plans == [[16], [16], [8], [1], [1]]


def test_a_prompt_of_several_chunks_says_once_that_it_waits_no_longer() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(make_request("a", prompt_of(40)))
    assert [[len(output.tokens) for output in step(scheduler)[1]] for _ in range(4)] == [[0], [], [1], [1]]


def test_running_streams_keep_their_pace_beside_a_long_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32, threshold=8)
    scheduler.add(make_request("stream", prompt_of(4)))
    step(scheduler)
    scheduler.add(make_request("long", prompt_of(40, 200)))
    plans = [sizes(step(scheduler)[0]) for _ in range(5)]
    assert plans == [[1, 8]] * 5


@pytest.mark.parametrize(("max_step_ms", "num_tokens"), [(None, 150), (120.5, 70), (1.0, MIN_PROMPT_TOKENS)])
def test_prompts_beside_streams_take_a_bounded_time(max_step_ms: float | None, num_tokens: int) -> None:
    """A millisecond for each token of a prompt, and 50 for a stream: prompts take three quarters, or what is left."""
    scheduler = make_scheduler(num_blocks=1000, max_num_batched_tokens=512, threshold=512)
    scheduler.config = replace(scheduler.config, max_step_ms=max_step_ms)
    scheduler.pace.model.costs = StepCosts(prompt_token=1e-3, decode=50e-3)
    scheduler.add(make_request("first", prompt_of(600), max_tokens=100))
    # Nobody waits for this one.
    assert sizes(step(scheduler)[0]) == [512]
    step(scheduler)
    scheduler.add(make_request("second", prompt_of(600, 1000)))
    assert sizes(step(scheduler)[0]) == [1, num_tokens]
    if max_step_ms is None:
        scheduler.config = replace(scheduler.config, max_step_slowdown=None)
        assert sizes(step(scheduler)[0]) == [1, 600 - num_tokens]


def test_decodes_come_before_prefills_in_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, max_num_seqs=8, threshold=6)
    scheduler.add(make_request("long", prompt_of(60)))
    step(scheduler)
    for i in range(4):
        scheduler.add(make_request(f"short {i}", prompt_of(1, 500 + i)))
    plans = [sizes(step(scheduler)[0]) for _ in range(4)]
    # The long prompt arrived first, and gets what the others leave.
    assert plans == [[6, 1, 1], [1, 1, 6], [1, 1, 6], [1, 1, 6]]


def test_priority_then_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("late", prompt_of(3), priority=1, max_tokens=1))
    scheduler.add(make_request("first", prompt_of(3, 200), max_tokens=1))
    scheduler.add(make_request("second", prompt_of(3, 300), max_tokens=1))
    finished = [step(scheduler)[1][0].request_id for _ in range(3)]
    assert finished == ["first", "second", "late"]


def test_samples_of_one_prompt_share_its_full_blocks() -> None:
    for caching in (True, False):
        scheduler = make_scheduler(enable_prefix_caching=caching)
        scheduler.add(make_request("a", prompt_of(10), n=3))
        assert sizes(step(scheduler)[0]) == [10]
        batch, _ = step(scheduler)
        assert sizes(batch) == [1, 2, 2]
        tables = [row.block_table for row in batch.rows]
        assert all(table[:2] == tables[0][:2] for table in tables)
        assert len({table[2] for table in tables}) == 3


def test_without_prefix_caching_requests_share_nothing() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    for request_id in "ab":
        scheduler.add(make_request(request_id, prompt_of(10), max_tokens=1))
        batch, outputs = step(scheduler)
        assert sizes(batch) == [10]
        assert outputs[0].num_cached_tokens == 0


def test_a_prefix_that_another_computes_just_now_is_waited_for() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, threshold=8)
    for index in range(3):
        scheduler.add(make_request(f"shares {index}", [*prompt_of(12), 200 + index], max_tokens=2))
    scheduler.add(make_request("other", prompt_of(6, 300), max_tokens=2))
    plans = [sizes(step(scheduler)[0]) for _ in range(3)]
    # Those that share its twelve tokens let the first one compute them; whoever does not goes ahead.
    assert plans == [[8, 6], [1, 5], [1, 1, 1]]
    assert scheduler.stats.prefix_cache_hits == 2 * 12


def test_whoever_waits_for_a_prefix_goes_on_when_its_owner_is_gone() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, threshold=8)
    for request_id in "ab":
        scheduler.add(make_request(request_id, prompt_of(20), max_tokens=1))
    assert sizes(step(scheduler)[0]) == [8]
    scheduler.abort("a")
    batch, _ = step(scheduler)
    assert [(row.start, len(row.token_ids)) for row in batch.rows] == [(8, 8)]


def test_an_equal_prompt_later_is_found_in_the_cache() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_of(12), max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("b", prompt_of(12), max_tokens=1))
    batch, outputs = step(scheduler)
    assert sizes(batch) == [1]
    assert batch.rows[0].num_stored_tokens == 12
    assert outputs[0].num_cached_tokens == 11
    assert scheduler.stats.prefix_cache_hits == 11
    assert scheduler.stats.prefix_cache_queries == 24


def test_the_last_in_order_is_preempted_and_comes_back() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", prompt_of(7), max_tokens=6))
    scheduler.add(make_request("b", prompt_of(7, 200), max_tokens=6))
    tokens: dict[str, int] = {"a": 0, "b": 0}
    while scheduler.has_work:
        for output in step(scheduler)[1]:
            tokens[output.request_id] += len(output.tokens)
    assert tokens == {"a": 6, "b": 6}
    assert scheduler.stats.num_preemptions == 1


@pytest.mark.parametrize(
    ("params", "drawn", "finish", "stop_token_id"),
    [
        ({}, EOS, "stop", None),
        ({"stop_token_ids": (5,)}, 5, "stop", 5),
        ({"ignore_eos": True, "max_tokens": 1}, EOS, "length", None),
        ({"max_tokens": 1}, 1, "length", None),
        ({"max_tokens": None}, 1, None, None),
    ],
)
def test_finish_reasons(
    params: dict[str, object], drawn: int, finish: str | None, stop_token_id: int | None
) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_of(3), **params))
    _, (output,) = step(scheduler, drawn)
    assert (output.finish_reason, output.stop_token_id) == (finish, stop_token_id)
    assert scheduler.has_work == (finish is None)


def test_generation_ends_at_the_context() -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.add(make_request("a", prompt_of(5), max_tokens=None))
    num_tokens = 0
    while scheduler.has_work:
        _, outputs = step(scheduler)
        num_tokens += len(outputs)
    assert num_tokens == 3
    assert outputs[0].finish_reason == "length"


def test_min_tokens_bans_what_would_end_the_sequence() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_of(3), min_tokens=2, stop_token_ids=(5,)))
    banned = []
    for _ in range(3):
        scheduler.schedule()
        (draw,) = scheduler.draws()
        assert draw is not None
        banned.append(draw.banned_token_ids)
        scheduler.update([SampledToken(1)])
    assert banned == [(EOS, 5), (EOS, 5), ()]


def test_a_failed_row_ends_its_request_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("bad", prompt_of(5)))
    scheduler.add(make_request("good", prompt_of(5, 200)))
    scheduler.schedule()
    bad, good = scheduler.update([RowFailure("broken"), SampledToken(1)])
    assert (bad.request_id, bad.finish_reason, bad.error) == ("bad", "error", "broken")
    assert (good.request_id, good.finish_reason) == ("good", None)
    assert list(scheduler.requests) == ["good"]


def test_aborting_one_sample_leaves_the_others() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_of(5), n=2))
    step(scheduler)
    step(scheduler)
    scheduler.abort("a", 0)
    assert [row.draw.index for row in scheduler.schedule().rows if row.draw] == [1]


def test_followers_go_on_when_their_leader_is_aborted_before_its_prompt_is_through() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(make_request("a", prompt_of(40), n=2, max_tokens=1))
    step(scheduler)
    scheduler.abort("a", 0)
    while scheduler.has_work:
        _, outputs = step(scheduler)
    assert [(output.index, output.finish_reason) for output in outputs] == [(1, "length")]


def coming_blocks(scheduler: Scheduler) -> set[bytes]:
    """Hashes of blocks of their prompts that running sequences have not computed yet, or just compute."""
    planned = {row.sequence: row.start for step in reversed(scheduler._in_flight) for row in step}
    return {
        block_hash
        for sequence in scheduler.running
        for block_hash in sequence.block_hashes[
            max(
                sequence.num_stored_tokens,
                planned.get(sequence, sequence.num_computed_tokens),
            )
            // BLOCK_SIZE : sequence.num_coming_blocks
        ]
    }


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(12, 40),
    budget=st.integers(4, 48),
    caching=st.booleans(),
    overlap=st.booleans(),
)
def test_two_hundred_requests_with_random_aborts_leave_nothing_behind(
    seed: int, num_blocks: int, budget: int, caching: bool, overlap: bool
) -> None:
    """Every request that is not aborted gets its tokens; at the end every block and slot is free, every count zero.

    With overlap a step is planned before the results of the one before are known.
    """
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks, budget, max_num_seqs=min(8, budget), enable_prefix_caching=caching)
    pool = scheduler.kv_cache.pool
    waiting = list(range(200))
    expected: dict[str, int] = {}
    received: dict[str, int] = {}
    in_flight: deque[list[RowResult]] = deque()
    prompts: dict[str, list[int]] = {}
    scored: dict[str, list[int]] = {}
    while waiting or scheduler.has_work or in_flight:
        for _ in range(min(len(waiting), rng.randrange(4))):
            request_id = str(waiting.pop())
            # Few distinct tokens, so that prompts share prefixes; lengths up to the whole cache.
            length = min(int(rng.expovariate(1 / 12)) + 1, num_blocks * BLOCK_SIZE - 6)
            prompt = [rng.randrange(2) for _ in range(length)]
            samples = rng.choice([1, 1, 1, 3])
            request = make_request(
                request_id,
                prompt,
                rng.randrange(2),
                max_tokens=rng.randrange(1, 6),
                n=samples,
                ignore_eos=True,
                prompt_logprobs=rng.choice([None, None, 0]),
            )
            if request.params.prompt_logprobs is not None and length > 1:
                prompts[request_id] = prompt[1:]
            expected[request_id] = samples * (request.params.max_tokens or 0)
            scheduler.add(request)
        if rng.random() < 0.2 and scheduler.requests:
            request_id = rng.choice(list(scheduler.requests))
            scheduler.abort(request_id)
            expected.pop(request_id)
            prompts.pop(request_id, None)
        if scheduler.has_work or in_flight:
            batch = scheduler.schedule()
            if batch.rows:
                check_plan(scheduler, batch)
                in_flight.append([result_of(row, rng.randrange(2)) for row in batch.rows])
            else:
                assert in_flight, "there is work, nothing in flight, and none was planned"
            outputs = []
            if len(in_flight) > 1 or not (overlap and batch.rows):
                outputs = scheduler.update(in_flight.popleft())
            for output in outputs:
                received[output.request_id] = received.get(output.request_id, 0) + len(output.tokens)
                if output.prompt_logprobs is not None:
                    scored.setdefault(output.request_id, []).extend(output.prompt_logprobs.token_ids)
        held = sum(block.ref_count for block in pool.blocks)
        assert held == sum(len(sequence.block_ids) for sequence in scheduler.running)
        assert all(sequence.status is SequenceStatus.RUNNING for sequence in scheduler.running)
        live = [sequence for sequences in scheduler.requests.values() for sequence in sequences]
        num_waiting = sum(sequence.status is SequenceStatus.WAITING for sequence in live)
        assert scheduler.stats.num_requests_waiting == num_waiting
        assert scheduler.kv_cache._coming.keys() == coming_blocks(scheduler)
    assert {request_id: received[request_id] for request_id in expected} == expected
    # Each token of a prompt once, whatever was preempted.
    assert {request_id: scored[request_id] for request_id in prompts} == prompts
    assert pool.num_free == pool.num_blocks
    assert sorted(free_list(pool)) == list(range(1, pool.num_blocks + 1))
    assert all(block.ref_count == 0 for block in pool.blocks)
    assert sorted(scheduler._free_slots) == list(range(scheduler.config.max_num_seqs))
    assert scheduler.stats.num_requests_running == scheduler.stats.num_requests_waiting == 0


def test_nobody_waits_for_a_block_that_was_computed_and_lost() -> None:
    """Two samples draw the same tokens, one of them enters the block, ends, and its block is taken."""
    scheduler = make_scheduler(num_blocks=12, max_num_batched_tokens=16)
    prompt = prompt_of(4)
    scheduler.add(make_request("twins", prompt, n=2, max_tokens=30, ignore_eos=True))
    for _ in range(6):
        step(scheduler)
    first, second = scheduler.running
    assert first.block_hashes[:2] == second.block_hashes[:2]
    scheduler.abort("twins", first.index)
    for first_token in (200, 300):
        scheduler.add(make_request("taker", prompt_of(26, first_token), max_tokens=1))
        while "taker" in scheduler.requests:
            step(scheduler)
    assert scheduler.kv_cache.pool.find(second.block_hashes[1]) is None
    scheduler.add(make_request("late", [*prompt, *[1] * 4, 9], max_tokens=1))
    _, outputs = step(scheduler)
    assert "late" in {output.request_id for output in outputs}


class CountedCache(KVCacheManager):
    """Counts how often a waiting sequence is looked at."""

    num_visits = 0

    def find_prefix(self, sequence: Sequence) -> list[int]:
        self.num_visits += 1
        return super().find_prefix(sequence)


def test_who_waits_for_a_prefix_is_not_looked_at_in_each_step() -> None:
    scheduler = make_scheduler(num_blocks=256, max_num_batched_tokens=12, threshold=8)
    scheduler.kv_cache = cache = CountedCache(scheduler.kv_cache.pool, BLOCK_SIZE)
    prefix = prompt_of(200)
    for index in range(100):
        scheduler.add(make_request(str(index), [*prefix, 400 + index], max_tokens=2))
    for _ in range(200 // 8):
        step(scheduler)
    assert cache.num_visits == 100
    while scheduler.has_work:
        step(scheduler)
    # Each twice, and the head of the queue once in each step that has no place for it.
    assert cache.num_visits <= 200 + scheduler.num_steps


def test_one_step_hashes_a_bounded_part_of_the_queue() -> None:
    scheduler = make_scheduler(num_blocks=8192, max_num_batched_tokens=12, threshold=8)
    length = MAX_HASHED_TOKENS // 4
    for index in range(12):
        scheduler.add(make_request(str(index), [*prompt_of(length), index], max_tokens=1))
    waiting = [sequences[0] for sequences in scheduler.requests.values()]
    num_hashed = []
    for _ in range(3):
        step(scheduler)
        num_hashed.append(sum(len(sequence.block_hashes) * BLOCK_SIZE for sequence in waiting))
    assert num_hashed == [5 * length, 10 * length, 12 * length]
