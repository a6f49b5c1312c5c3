"""What the engine tells of itself: its limits once it has started, its counts after every step."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from engine.core.step_costs import StepCosts

if TYPE_CHECKING:
    from engine.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a started engine tells those who send it requests.

    Attributes:
        max_num_seqs: Most sequences in a step.
        default_params: Sampling parameters that the model's generation_config.json recommends.
        memory_plan: For people.
        num_cache_bytes: Size of a rank's KV cache, where the free memory decides on it; None elsewhere.
        identity: Stands for the model, its quantization and the type of its cache.
    """

    max_model_len: int
    vocab_size: int
    hidden_size: int
    max_num_seqs: int
    default_params: dict[str, Any]
    memory_plan: str
    num_cache_bytes: int | None
    identity: str

    def pinned(self, config: EngineConfig) -> EngineConfig:
        """The options for an engine in the place of this one.

        What was planned by the memory that was free then stays as it is: open requests rely on it.
        """
        size = config.kv_cache_memory if self.num_cache_bytes is None else self.num_cache_bytes
        return replace(config, max_model_len=self.max_model_len, kv_cache_memory=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the time depends on that a request waits, as of the last step.

    Attributes:
        step_costs: What steps cost.
        decode_seconds: What a step takes of those that decode now, without prompts.
        num_step_tokens: Most tokens of prompts in a step beside these.
        num_prompt_step_tokens: Most of one prompt.
        num_prefilled_tokens: Tokens computed or found of prompts that are not through.
        num_slots: Sequences that can run at a time.
        slot_seconds: Mean time that a sequence runs; 0 as long as nothing is known.
        num_engines: Those that share the requests; the other attributes are one's, but for num_prefilled_tokens and
            num_slots, which are all engines' together.
    """

    step_costs: StepCosts = StepCosts()
    decode_seconds: float = 0.0
    num_step_tokens: int = 1
    num_prompt_step_tokens: int = 1
    num_prefilled_tokens: int = 0
    num_slots: int = 1
    slot_seconds: float = 0.0
    num_engines: int = 1


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
        starved_seconds: Time in which the engine was ready to run and other programs had the CPUs, cumulative.
        load: What a request has to wait for.
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
    starved_seconds: float = 0.0
    load: Load = field(default_factory=Load)


def joined(loads: list[Load]) -> Load:
    """The load of engines that share the requests."""
    # One that has made no step yet knows nothing of what they cost.
    known = [load for load in loads if load.step_costs != StepCosts()]
    if not known:
        return Load(num_engines=max(1, len(loads)), num_slots=max(1, sum(load.num_slots for load in loads)))
    return Load(
        step_costs=StepCosts(
            *(fmean(getattr(load.step_costs, price.name) for load in known) for price in fields(StepCosts))
        ),
        decode_seconds=fmean(load.decode_seconds for load in known),
        num_step_tokens=round(fmean(load.num_step_tokens for load in known)),
        num_prompt_step_tokens=round(fmean(load.num_prompt_step_tokens for load in known)),
        num_prefilled_tokens=sum(load.num_prefilled_tokens for load in loads),
        num_slots=sum(load.num_slots for load in loads),
        slot_seconds=fmean(load.slot_seconds for load in known),
        num_engines=len(loads),
    )
