"""What the engine counts. Cumulative counts only grow; the rest describe the moment of the last step."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, kw_only=True):
    """Counters and gauges of one engine.

    Attributes:
        num_requests_running: Sequences that hold blocks.
        num_requests_waiting: Sequences that wait for a place, the preempted ones too.
        kv_cache_usage_perc: Share of the blocks that sequences hold, 0..1.
        prefix_cache_queries, prefix_cache_hits: Tokens looked up and found, cumulative.
        num_preemptions: Cumulative.
        num_steps: Cumulative.
        num_scheduled_tokens: Tokens computed in all steps, cumulative.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage_perc: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_scheduled_tokens: int = 0
