"""Models, health, version and metrics."""

from __future__ import annotations

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families


def metrics(http: httpx.Client) -> dict[str, float]:
    """Samples by name and, where it has one, finished_reason: ``request_success_total:stop``."""
    result = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            assert sample.name.startswith("engine_")
            assert sample.labels["model_name"] == "llama"
            reason = sample.labels.get("finished_reason")
            name = sample.name.removeprefix("engine_") + (f":{reason}" if reason else "")
            result[name] = sample.value
    return result


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("llama", "model")
    assert model.max_model_len > 0
    assert client.models.retrieve("llama") == model


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "healthy"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json()["version"].count(".") == 2


def test_metrics_count_what_was_served(http: httpx.Client, client: openai.OpenAI) -> None:
    before = metrics(http)
    completion = client.completions.create(
        model="llama", prompt=[1, 2, 3, 4, 5, 6, 7], max_tokens=9, n=2, extra_body={"ignore_eos": True}
    )
    assert completion.usage.completion_tokens == 18
    after = metrics(http)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("prompt_tokens_total") == 7
    assert grown("generation_tokens_total") == 18
    assert grown("request_success_total:length") == 2
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("inter_token_latency_seconds_count") == 16
    assert grown("request_time_per_output_token_seconds_count") == 2
    assert grown("e2e_request_latency_seconds_count") == 2
    assert grown("iteration_tokens_total_sum") >= 7 + 16
    assert grown("iteration_tokens_total_count") >= 9
    assert grown("prefix_cache_queries_total") >= 7
    assert after["num_preemptions_total"] == 0
    assert 0 <= after["kv_cache_usage_perc"] <= 1
    assert {"num_requests_running", "num_requests_waiting", "prefix_cache_hits_total"} <= set(after)
