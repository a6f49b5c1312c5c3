"""The engine on Llama-3.1-8B's shapes with random weights: decode and prefill, beside what the card allows."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.steps import Skipped, Step, Values
from benchmarks.gpu.timing import events
from engine.config import EngineConfig
from engine.core.request import Request
from engine.core.sampling_params import SamplingParams
from engine.executor.start import start_engine
from engine.executor.triton_executor import TritonExecutor
from engine.models.config import ModelConfig

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
"""Meta's Llama-3.1-8B."""

QUANTS = ("int4", "int8", "none")
BATCHES = (1, 8, 32, 128)
PROMPT_TOKENS = 128
DECODE_STEPS = 64
WARM_UP_STEPS = 8
PROFILED_BATCH = 32
PREFILL = (8, 2048)
"""Prompts, and tokens of each."""


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gpu-check-llama-")


def write_config(config: dict[str, Any] = LLAMA_CONFIG) -> Path:
    """A model directory that holds nothing but a config.json."""
    path = Path(_directory().name)
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_config(path: Path, quant: str, **options: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "model": str(path),
        "quant": "int4:g128" if quant == "int4" else quant,
        "load_format": "dummy",
        "max_model_len": 4096,
        "max_num_seqs": max(BATCHES),
        "kv_cache_memory": "16GiB",
        "enable_prefix_caching": False,
        "cache_dir": _directory().name,
    }
    return EngineConfig(**(defaults | options))


class Bench:
    """An engine, and the requests that it is measured with."""

    def __init__(self, config: EngineConfig) -> None:
        start = time.perf_counter()
        self.core = start_engine(config, Path(config.model), ())
        self.start_seconds = time.perf_counter() - start
        self._source = random.Random()
        self._num_requests = 0

    def add(self, count: int, prompt_tokens: int, output_tokens: int, temperature: float) -> dict[str, int]:
        """Requests of fresh random tokens: by id, how many tokens each must bring."""
        params = SamplingParams(temperature=temperature, max_tokens=output_tokens, ignore_eos=True)
        vocab_size = self.core.info.vocab_size
        expected = {}
        for _ in range(count):
            self._num_requests += 1
            request_id = str(self._num_requests)
            ids = [self._source.randrange(vocab_size) for _ in range(prompt_tokens)]
            self.core.add_request(
                Request(request_id=request_id, prompt_token_ids=ids, params=params, seed=self._num_requests)
            )
            expected[request_id] = output_tokens
        return expected

    def step(self, missing: dict[str, int]) -> None:
        """One step; what it brings is taken from `missing`."""
        for output in self.core.step():
            assert output.error is None, f"request {output.request_id}: {output.error}"
            missing[output.request_id] -= len(output.tokens)
            is_finished = output.finish_reason is not None
            assert is_finished == (missing[output.request_id] == 0), "a request stopped early or ran on"

    def finish(self, missing: dict[str, int]) -> None:
        """Runs until all is there."""
        while self.core.has_work:
            self.step(missing)
        assert not any(missing.values()), f"tokens are missing: {missing}"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_decode(bench: Bench, count: int, temperature: float = 1.0, num_steps: int = DECODE_STEPS) -> Values:
    """Seconds of a decode step of `count` sequences, sampled tokens fed back, median and mean."""
    # All end with the same step, some time after the last that is timed.
    output_tokens = num_steps + WARM_UP_STEPS + 40
    missing = bench.add(count, PROMPT_TOKENS, output_tokens, temperature)
    while max(missing.values()) > output_tokens - WARM_UP_STEPS:
        bench.step(missing)
    assert min(missing.values()) > num_steps + 1, "requests would end while they are timed"
    _synchronize()
    before, times = sum(missing.values()), []
    for _ in range(num_steps):
        start = time.perf_counter()
        bench.step(missing)
        times.append(time.perf_counter() - start)
    assert before - sum(missing.values()) == count * num_steps, (
        "a step did not bring a token to each sequence"
    )
    context = PROMPT_TOKENS + output_tokens - sum(missing.values()) / count - num_steps / 2
    bench.finish(missing)
    mean = statistics.mean(times)
    return {
        "batch": count,
        "step": mean,
        "median": statistics.median(times),
        "tok/s": count / mean,
        "context": context,
    }


def read_bytes(bench: Bench, count: int, context: float) -> int:
    """Bytes that a decode step reads: all weights but the embedding table, and the keys and values."""
    runner = bench.core.model.runner
    model, plan = runner.model_config, runner.plan
    width = 2 if runner.config.quant == "none" else 1 + 2 / 32
    table = 0 if model.ties_embeddings else model.vocab_size * model.hidden_size * width
    return int(plan.weights - table + count * context * plan.block / plan.block_size)


def prefill_operations(model: ModelConfig, count: int, length: int) -> tuple[int, int]:
    """Operations of the layers' products with weights, and of attention, for `count` prompts."""
    attention = model.num_heads * model.head_dim
    weights = model.hidden_size * (2 * attention + 2 * model.num_kv_heads * model.head_dim)
    weights += 3 * model.hidden_size * model.intermediate_size
    pairs = length * (length + 1) // 2
    return 2 * model.num_layers * weights * count * length, 4 * model.num_layers * attention * pairs * count


def time_prefill(bench: Bench, count: int, length: int) -> Values:
    """Prompt tokens a second of prompts that arrive together, one token drawn for each."""
    times = []
    for _ in range(3):
        missing = bench.add(count, length, 1, 1.0)
        _synchronize()
        start = time.perf_counter()
        bench.finish(missing)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    products, attention = prefill_operations(bench.core.model.runner.model_config, count, length)
    return {
        "prompts": count,
        "length": length,
        "seconds": seconds,
        "tok/s": count * length / seconds,
        "weight operations": products,
        "attention operations": attention,
    }


def kernel_seconds(bench: Bench, count: int, num_steps: int = 16) -> float:
    """Seconds of a decode step that kernels run, by torch's profiler."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    output_tokens = num_steps + WARM_UP_STEPS + 40
    missing = bench.add(count, PROMPT_TOKENS, output_tokens, 1.0)
    while max(missing.values()) > output_tokens - WARM_UP_STEPS:
        bench.step(missing)
    _synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            bench.step(missing)
        _synchronize()
    bench.finish(missing)
    microseconds = sum(
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    )
    if not microseconds:
        raise Skipped("the profiler saw no kernels")
    # With overlap the last forward pass lies within as the first one does not: as many of each kind.
    return microseconds / 1e6 / num_steps


def replay_seconds(bench: Bench, count: int) -> float:
    """Seconds that the forward pass of a decode step takes as a CUDA graph, gaps between kernels included."""
    executor = bench.core.model.runner.executor
    if not isinstance(executor, TritonExecutor) or executor.graphs is None:
        raise Skipped("no CUDA graphs")
    start, end = events()
    executor.graphs.replay(count)
    start.record()
    for _ in range(20):
        executor.graphs.replay(count)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / 20


def _decode(bench: Callable[[], Bench], count: int) -> Values:
    values = time_decode(bench(), count)
    values["bytes"] = read_bytes(bench(), count, values["context"])
    return values


def _prefill(bench: Callable[[], Bench]) -> Values:
    return time_prefill(bench(), *PREFILL)


def _outside(bench: Callable[[], Bench], count: int) -> Values:
    """The share of a step in which no kernel runs: kernels by the profiler, the step without it."""
    step = time_decode(bench(), count)["step"]
    values: Values = {"batch": count, "step": step, "forward": replay_seconds(bench(), count)}
    values["kernels"] = kernel_seconds(bench(), count)
    values["share"] = max(0.0, 1 - values["kernels"] / step)
    return values


def _switched(bench: Callable[[], Bench], count: int) -> Values:
    """The same decode without overlap, and without CUDA graphs either."""
    core = bench().core
    executor = core.model.runner.executor
    assert isinstance(executor, TritonExecutor)
    overlap, graphs = core.overlap, executor.graphs
    try:
        core.overlap = False
        plain = time_decode(bench(), count)["tok/s"]
        executor.graphs = None
        eager = time_decode(bench(), count, num_steps=DECODE_STEPS // 2)["tok/s"]
        core.overlap = overlap
        overlapped = time_decode(bench(), count, num_steps=DECODE_STEPS // 2)["tok/s"]
    finally:
        core.overlap, executor.graphs = overlap, graphs
    return {"batch": count, "no overlap": plain, "eager": overlapped, "eager, no overlap": eager}


def _no_compilations(bench: Callable[[], Bench]) -> Values:
    count = bench().core.model.runner.compilations.count
    assert not count, f"{count} kernels were compiled while serving"
    return {}


def end_to_end_steps(quant: str, **options: Any) -> list[Step]:
    """Decode, prefill and what lies outside the kernels, for one quantization; the first step starts the engine."""

    benches: list[Bench | None] = []

    def bench() -> Bench:
        if not benches:
            benches.append(None)
            benches[0] = Bench(make_config(write_config(), quant, **options))
        if benches[0] is None:
            raise Skipped("the engine did not start")
        return benches[0]

    def start() -> Values:
        plan = bench().core.model.runner.plan
        return {"start": bench().start_seconds, "weights": plan.weights, "plan": str(plan)}

    steps = [Step("start", quant, start)]
    steps += [Step("decode", f"{quant} batch {count}", partial(_decode, bench, count)) for count in BATCHES]
    return [
        *steps,
        Step("prefill", quant, partial(_prefill, bench)),
        Step("outside kernels", quant, partial(_outside, bench, PROFILED_BATCH)),
        Step("switched off", quant, partial(_switched, bench, PROFILED_BATCH)),
        Step("compiled while serving", quant, partial(_no_compilations, bench)),
    ]
