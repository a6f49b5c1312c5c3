"""What a long queue costs the scheduler: `python -m benchmarks.long_queue`.

The scheduler runs without a model. Prints the time of a step with few and with many requests waiting, also of many
owners and priorities, of each abort where many wait, and of the first steps where all wait for one long prompt.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median

from engine.config import SchedulerConfig
from engine.core.grammar import Grammars
from engine.core.kv_cache import BlockPool, KVCacheManager
from engine.core.request import Request, SampledToken
from engine.core.sampling_params import SamplingParams
from engine.core.scheduler import Scheduler

BLOCK_SIZE = 16
NUM_BLOCKS = 8192
MAX_MODEL_LEN = 8192
NUM_STREAMS = 64


def make_scheduler() -> Scheduler:
    config = SchedulerConfig(
        max_num_batched_tokens=512,
        max_num_seqs=NUM_STREAMS,
        long_prefill_token_threshold=256,
        max_model_len=MAX_MODEL_LEN,
    )
    cache = KVCacheManager(BlockPool(NUM_BLOCKS + 1), BLOCK_SIZE)
    return Scheduler(config, cache, [0], b"", True, Grammars(320, [0]))


def add(scheduler: Scheduler, name: str, prompt: list[int], owner: str = "", priority: int = 0) -> None:
    params = SamplingParams(max_tokens=1000, ignore_eos=True)
    scheduler.add(
        Request(
            request_id=name, prompt_token_ids=prompt, params=params, seed=0, owner=owner, priority=priority
        )
    )


def step(scheduler: Scheduler) -> float:
    """Seconds of a step in the scheduler alone."""
    began = time.perf_counter()
    batch = scheduler.schedule()
    draws = scheduler.draws()
    scheduler.update([None if draw is None else SampledToken(1) for draw in draws])
    assert batch.rows
    return time.perf_counter() - began


def with_waiting(num_waiting: int, num_owners: int = 1, num_priorities: int = 1) -> Scheduler:
    """Streams that decode in all places, and requests that wait for one."""
    scheduler = make_scheduler()
    for index in range(NUM_STREAMS + num_waiting):
        priority = max(0, index - NUM_STREAMS) % num_priorities
        add(scheduler, str(index), [index + 1] * 8, str(index % num_owners), priority)
    for _ in range(4):
        step(scheduler)
    assert scheduler.stats.num_requests_waiting == num_waiting
    return scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=50_000, help="requests that wait")
    num_waiting = parser.parse_args().waiting
    few, many, shared = with_waiting(50), with_waiting(num_waiting), with_waiting(num_waiting, 1000, 10)
    runs = [(step(few), step(many), step(shared)) for _ in range(200)]
    times = [median(column) * 1e3 for column in zip(*runs, strict=True)]
    print(f"a step of {NUM_STREAMS} streams: {times[0]:.3f} ms with 50 waiting")
    for what, seconds in (("", times[1]), (", of 1000 owners and 10 priorities", times[2])):
        print(f"{num_waiting} waiting{what}: {seconds:.3f} ms, {seconds / times[0]:.2f} times as long")
    names = [str(NUM_STREAMS + index) for index in range(num_waiting)]
    random.Random(0).shuffle(names)
    began = time.perf_counter()
    for name in names:
        many.abort(name)
    print(f"{num_waiting} aborts: {time.perf_counter() - began:.3f} s")
    scheduler = make_scheduler()
    prefix = [1 + index % 1000 for index in range(8000)]
    for index in range(1000):
        add(scheduler, str(index), [*prefix, index])
    steps = [step(scheduler) for _ in range(25)]
    print(
        f"1000 wait for one prompt of 8000: first step {steps[0] * 1e3:.1f} ms, longest {max(steps) * 1e3:.1f} ms, "
        f"median {median(steps) * 1e3:.2f} ms"
    )


if __name__ == "__main__":
    main()
