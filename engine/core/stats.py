"""What the engine tells of itself: its limits once it has started, its counts after every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a started engine tells those who send it requests.

    Attributes:
        default_params: Sampling parameters that the model's generation_config.json recommends.
        memory_plan: For people.
        identity: Stands for the model, its quantization and the type of its cache.
    """

    max_model_len: int
    vocab_size: int
    default_params: dict[str, Any]
    memory_plan: str
    identity: str


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counters and gauges of one engine. Cumulative counts only grow; the rest describe the moment.

    Attributes:
        num_requests_running: Sequences that hold blocks.
        num_requests_waiting: Sequences that wait for a place, the preempted ones too.
        kv_cache_usage_perc: Share of the blocks that sequences hold, 0..1.
        prefix_cache_queries, prefix_cache_hits: Tokens looked up and found, cumulative.
        num_preemptions: Cumulative.
        num_steps: Cumulative.
        num_scheduled_tokens: Tokens computed in all steps, cumulative.
        num_kernel_compilations: Kernels compiled since the engine has started, cumulative.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage_perc: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_kernel_compilations: int = 0
