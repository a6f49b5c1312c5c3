"""What `serve run engine.parallel.ray_serve:build name=value …` makes of its words, without a cluster."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from api import QueueLimits
from engine.config import EngineConfig
from engine.errors import ConfigError

serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed: pip install '.[ray]'")

from engine.parallel import ray_serve  # noqa: E402


def options(**words: Any) -> dict[str, Any]:
    """Of the engines that the ingress stands before."""
    given: dict[str, Any] = ray_serve.build(words)._bound_deployment.init_args[0]
    return given


def test_words_are_options() -> None:
    given = options(
        overlap="false", exact_reduce="false", deterministic="true", max_num_seqs="8", replicas="2"
    )
    expected = EngineConfig(overlap=False, exact_reduce=False, deterministic=True, max_num_seqs=8)
    assert given == asdict(expected)
    # As a file of Ray Serve's has them.
    assert given == options(overlap=False, exact_reduce=False, deterministic=True, max_num_seqs=8, replicas=2)
    assert options() == asdict(EngineConfig())


def test_the_queue_has_the_bounds_that_the_words_say() -> None:
    words = {"max_queued_requests": "3", "slo_ttft_ms": "1500", "queue_timeout": "2.5"}
    assert (
        QueueLimits(max_queued_requests=3, slo_ttft_ms=1500, queue_timeout=2.5)
        in ray_serve.build(words)._bound_deployment.init_args
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"overlap": "no"}, "overlap must be true or false, got 'no'"),
        ({"num_threads": "true"}, "num_threads must be an integer, got 'true'"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"replicas": "0"}, "replicas must be a number of at least 1"),
        ({"max_queued_requests": "0"}, "max_queued_requests must be a number of at least 1"),
        ({"slo_ttft_ms": "0"}, "slo_ttft_ms must be a number above 0"),
        ({"threads": "1"}, "unknown option 'threads'; the options are model, quant"),
    ],
)
def test_a_word_that_cannot_work_is_one_line(words: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ray_serve.build(words)


def test_nothing_is_built_before_it_is_asked_for() -> None:
    assert not [name for name, value in vars(ray_serve).items() if isinstance(value, serve.Application)]
