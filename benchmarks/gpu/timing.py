"""Timing GPU work: calls captured in a CUDA graph, so that launching them costs the host nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
Timer = Callable[[Sequence[Call]], float]
"""Median seconds of one of the calls, which do the same work on different data."""

GRAPH_SECONDS = 2e-3
"""A graph is to run so long at least, beside which its own launch is nothing."""

NUM_REPLAYS = 15

CACHE_COPIES = 4
"""So many times the second-level cache is to be filled before data is read again."""


def num_copies(num_bytes: int, device: torch.device) -> int:
    """Copies of data of this size that the second-level cache cannot keep."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(CACHE_COPIES * cache / max(num_bytes, 1)))


def events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    event = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)  # type: ignore[no-untyped-call]


def time_on_gpu(calls: Sequence[Call]) -> float:
    """A `Timer`: the median over replays of a CUDA graph in which the calls take turns, by CUDA events."""
    start, end = events()
    torch.cuda.synchronize()  # the data is there before another stream reads it
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for call in calls:  # compiles, loads, allocates
            call()
        torch.cuda.synchronize()
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
    # Launched one by one, small kernels take the time of their launch: an upper bound.
    seconds = max(start.elapsed_time(end) / 1e3 / len(calls), 1e-7)
    rounds = max(1, math.ceil(GRAPH_SECONDS / seconds / len(calls)))
    if seconds < 1e-4:
        rounds = max(rounds, math.ceil(200 / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(NUM_REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / (rounds * len(calls)))
    return statistics.median(times)
