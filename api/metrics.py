"""Prometheus metrics: vLLM's names under the prefix engine_, in a registry of their own."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.core.outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput

if TYPE_CHECKING:
    from engine.frontend.async_engine import ServedEngine

FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160, 640)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 80)
LAG_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
REQUEST_BUCKETS = (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960, 1920)


class EngineCollector(Collector):
    """Reads the engine's own counters when somebody asks for them."""

    def __init__(self, engine: ServedEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        gauges = (
            ("num_requests_running", "Sequences in the running batch", stats.num_requests_running),
            ("num_requests_waiting", "Sequences that wait for a place", stats.num_requests_waiting),
            (
                "kv_cache_usage_perc",
                "Share of the KV cache's blocks in use, 0 to 1",
                stats.kv_cache_usage_perc,
            ),
        )
        for name, help_text, value in gauges:
            gauge = GaugeMetricFamily(f"engine_{name}", help_text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        counters = (
            ("prefix_cache_queries", "Tokens looked up in the prefix cache", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache", stats.prefix_cache_hits),
            ("num_preemptions", "Preempted sequences", stats.num_preemptions),
            (
                "num_kernel_compilations",
                "GPU kernels compiled after the start, of which there should be none",
                stats.num_kernel_compilations,
            ),
            (
                "starved_seconds",
                "Time in which the engine was ready to run and other programs had the CPUs",
                stats.starved_seconds,
            ),
        )
        for name, help_text, value in counters:
            counter = CounterMetricFamily(f"engine_{name}", help_text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        # The engine keeps sum and count alone, so that its steps pay for no buckets.
        tokens = HistogramMetricFamily(
            "engine_iteration_tokens_total", "Tokens computed in a step", labels=["model_name"]
        )
        tokens.add_metric([self._model_name], [("+Inf", stats.num_steps)], stats.num_scheduled_tokens)
        yield tokens


class TokenCollector(Collector):
    """Counts and times generated tokens, in one thread: prometheus_client's own counters take locks for each."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._num_tokens = 0
        self._num_intervals = [0] * (len(TOKEN_BUCKETS) + 1)
        self._seconds = 0.0

    def add(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens

    def add_interval(self, seconds: float) -> None:
        """Counts the time between two tokens of a sample."""
        self._num_intervals[bisect_left(TOKEN_BUCKETS, seconds)] += 1
        self._seconds += seconds

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("engine_generation_tokens", "Generated tokens", labels=["model_name"])
        tokens.add_metric([self._model_name], self._num_tokens)
        yield tokens
        intervals = HistogramMetricFamily(
            "engine_inter_token_latency_seconds",
            "Time between the tokens of a sample",
            labels=["model_name"],
        )
        limits = [*map(floatToGoString, TOKEN_BUCKETS), "+Inf"]
        counts = map(float, accumulate(self._num_intervals))
        intervals.add_metric([self._model_name], list(zip(limits, counts, strict=True)), self._seconds)
        yield intervals


@dataclass(slots=True)
class SampleTimes:
    """When one sample's tokens arrived, in seconds of `time.perf_counter`."""

    first: float
    last: float
    num_tokens: int


@dataclass(slots=True)
class RequestTimes:
    arrival: float
    samples: dict[int, SampleTimes] = field(default_factory=dict)
    is_answered: bool = False
    num_finished: int = 0


class Metrics:
    """Counts and times requests as the server sees them."""

    def __init__(self, engine: ServedEngine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, model_name))
        self._tokens = TokenCollector(model_name)
        self.registry.register(self._tokens)
        self._model_name = model_name
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token", FIRST_TOKEN_BUCKETS
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time a token of a finished sample, without the first",
            TOKEN_BUCKETS,
        )
        self._whole_request = self._histogram(
            "e2e_request_latency_seconds", "Arrival to end of a finished sample", REQUEST_BUCKETS
        )
        self._loop_lag = self._histogram(
            "api_event_loop_lag_seconds",
            "How late the event loop of the API's process is, twice a second",
            LAG_BUCKETS,
        )
        self._success = Counter(
            "engine_request_success",
            "Ended samples by the reason of their end",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._predicted = self._histogram(
            "predicted_time_to_first_token_seconds",
            "Arrival to first token, as predicted on arrival",
            FIRST_TOKEN_BUCKETS,
        )
        self._refused = Counter(
            "engine_refused_requests",
            "Requests that were refused because too much waited already",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self._slow_readers = self._counter(
            "slow_readers", "Connections that were closed because their clients did not read"
        )
        self._unknown_members = Counter(
            "engine_unknown_request_members",
            "Members of requests that were accepted and read by nothing",
            ["model_name", "endpoint"],
            registry=self.registry,
        )

    def _counter(self, name: str, help_text: str) -> Counter:
        counter = Counter(f"engine_{name}", help_text, ["model_name"], registry=self.registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"engine_{name}", help_text, ["model_name"], buckets=buckets, registry=self.registry
        )
        return histogram.labels(self._model_name)

    def observe_loop_lag(self, seconds: float) -> None:
        self._loop_lag.observe(seconds)

    def count_refusal(self, reason: str) -> None:
        self._refused.labels(self._model_name, reason).inc()

    def count_slow_reader(self) -> None:
        self._slow_readers.inc()

    def observe_prediction(self, seconds: float) -> None:
        self._predicted.observe(seconds)

    def count_unknown_member(self, endpoint: str) -> None:
        self._unknown_members.labels(self._model_name, endpoint).inc()

    @contextmanager
    def observing(
        self, arrival: float, num_prompt_tokens: int, num_samples: int
    ) -> Iterator[Callable[[RequestOutput], None]]:
        """Measures one request; what it yields is to be called with each output of it.

        Args:
            arrival: When it came, in seconds of `time.perf_counter`.
        """
        times = RequestTimes(arrival)
        reason = "abort"

        def observe(output: RequestOutput) -> None:
            now = time.perf_counter()
            if not times.is_answered:
                self._observe_prompt(output, times, now, num_prompt_tokens)
            for sample in output.outputs:
                self._observe_sample(sample, times, now)

        try:
            yield observe
        except Exception:
            reason = "error"
            raise
        finally:
            self._success.labels(self._model_name, reason).inc(num_samples - times.num_finished)

    async def observe_embedding(
        self, embedding: Awaitable[EmbeddingRequestOutput], arrival: float, num_prompt_tokens: int
    ) -> EmbeddingRequestOutput:
        """Waits for one embedding, and measures it as a sample without tokens."""
        reason = "abort"
        try:
            output = await embedding
            reason = "stop" if output.error is None else "error"
        except Exception:
            reason = "error"
            raise
        finally:
            self._success.labels(self._model_name, reason).inc()
        self._prompt_tokens.inc(num_prompt_tokens)
        self._whole_request.observe(time.perf_counter() - arrival)
        return output

    def _observe_prompt(
        self, output: RequestOutput, times: RequestTimes, now: float, num_prompt_tokens: int
    ) -> None:
        has_tokens = any(sample.token_ids for sample in output.outputs)
        # A request that wants nothing but its prompt computed ends without a token.
        times.is_answered = has_tokens or any(sample.finish_reason == "length" for sample in output.outputs)
        if times.is_answered:
            self._prompt_tokens.inc(num_prompt_tokens)
        if has_tokens:
            self._first_token.observe(now - times.arrival)

    def _observe_sample(self, sample: CompletionOutput, times: RequestTimes, now: float) -> None:
        num_new = len(sample.token_ids)
        seen = times.samples.get(sample.index)
        if num_new:
            self._tokens.add(num_new)
            if seen is None:
                seen = times.samples[sample.index] = SampleTimes(now, now, num_new)
            else:
                self._tokens.add_interval((now - seen.last) / num_new)
                seen.last = now
                seen.num_tokens += num_new
        if sample.finish_reason is not None:
            times.num_finished += 1
            self._success.labels(self._model_name, sample.finish_reason).inc()
            self._whole_request.observe(now - times.arrival)
            if seen is not None and seen.num_tokens > 1:
                self._per_token.observe((seen.last - seen.first) / (seen.num_tokens - 1))
