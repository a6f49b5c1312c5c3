"""Replicas of an engine behind one OpenAI-compatible endpoint, on Ray Serve.

    serve run engine.parallel.ray_serve:build model=llama quant=int8 replicas=2

    client ── HTTP ──▶ Ingress: the application of `api`, over Replicas
                         │ Resumable ──▶ Replica: AsyncEngine ──▶ its engine process
                         │      by PrefixRouter, to the one that has the prompt's prefix
                         ◀── RequestOutput, token by token

An open request outlives the replica that it is at; see `engine.router.replicas`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from api import QueueLimits, create_app, read_keys
from api.admission import Admission
from api.keys import ApiKey
from engine.arguments import read_words
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.router.policies import PrefixRouter, QueuedTokensPolicy
from engine.router.replicas import Replica, Replicas

MAX_OPEN_REQUESTS = 4096
"""Open requests of a replica, and of the ingress: engines queue by themselves."""

HEALTH_SECONDS = 1.0


@serve.ingress()
class Ingress:
    """The application in front of the replicas.

    Args:
        options: The fields of EngineConfig.
        api_key, api_keys, open_metrics: As in `api.create_app`.
        limits: How much may wait at all replicas together.
    """

    def __init__(
        self,
        options: dict[str, Any],
        served_model_names: list[str],
        api_key: str | None,
        api_keys: list[ApiKey],
        open_metrics: bool,
        limits: QueueLimits,
        handle: DeploymentHandle,
    ) -> None:
        self._engine = Replicas(EngineConfig(**options), handle)
        self._names = served_model_names
        self._limits = limits
        self._access: dict[str, Any] = {
            "api_key": api_key,
            "api_keys": api_keys,
            "open_metrics": open_metrics,
        }

    def __serve_build_asgi_app__(self) -> Any:
        engine = self._engine
        admission = Admission(lambda: engine.stats, self._limits)
        return create_app(engine, served_model_names=self._names, admission=admission, **self._access)


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application, for `serve run engine.parallel.ray_serve:build name=value …`.

    Args:
        arguments: Options of EngineConfig, true or false for what is on or off; served_model_name (several with
            commas), api_key, api_keys, open_metrics and the bounds of the queue, and its own: replicas; max_replicas,
            up to which Ray Serve adds some while more than target_queued_tokens wait at each.

    Raises:
        ConfigError: An option that cannot work.
    """
    given = dict(arguments)
    num_replicas = _count(given, "replicas") or 1
    max_replicas = _count(given, "max_replicas") or num_replicas
    target = _count(given, "target_queued_tokens") or 8192
    names, api_key = given.pop("served_model_name", ""), given.pop("api_key", None)
    keys_file, open_metrics = given.pop("api_keys", None), given.pop("open_metrics", "false")
    limits = QueueLimits(
        max_queued_requests=_count(given, "max_queued_requests"),
        max_queued_tokens=_count(given, "max_queued_tokens"),
        slo_ttft_ms=_positive(given, "slo_ttft_ms"),
        queue_timeout=_positive(given, "queue_timeout"),
    )
    if open_metrics not in ("true", "false"):
        raise ConfigError(f"open_metrics must be true or false, got {open_metrics!r}")
    config = EngineConfig.from_options(**read_words(given))
    options = asdict(config)
    scaling: dict[str, Any] = {"num_replicas": num_replicas}
    if max_replicas > num_replicas:
        policy = AutoscalingPolicy(
            policy_function=QueuedTokensPolicy, policy_kwargs={"target_queued_tokens": target}
        )
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=num_replicas, max_replicas=max_replicas, policy=policy
            )
        }
    replicas = serve.deployment(
        Replica,
        ray_actor_options=_resources(config),
        max_ongoing_requests=MAX_OPEN_REQUESTS,
        health_check_period_s=HEALTH_SECONDS,
        # The ingress logs requests; here every look at the counts would be a line, too.
        logging_config=LoggingConfig(enable_access_log=False),
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"block_size": config.block_size}
        ),
        **scaling,
    ).bind(options)
    return serve.deployment(Ingress, max_ongoing_requests=MAX_OPEN_REQUESTS).bind(
        options,
        names.split(",") if names else [config.model],
        api_key,
        [] if keys_file is None else read_keys(keys_file),
        open_metrics == "true",
        limits,
        replicas,
    )


def _count(given: dict[str, Any], name: str) -> int | None:
    value = str(given.pop(name, ""))
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name} must be a number of at least 1, got {value!r}")
    return int(value)


def _positive(given: dict[str, Any], name: str) -> float | None:
    value = str(given.pop(name, ""))
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not number > 0.0:
        raise ConfigError(f"{name} must be a number above 0, got {value!r}")
    return number


def _resources(config: EngineConfig) -> dict[str, float]:
    """What Ray sets aside for a replica.

    Raises:
        ConfigError: Its ranks would look for GPUs that Ray keeps for it.
    """
    if config.device != "cuda":
        return {"num_cpus": config.num_threads or 1}
    if config.distributed_executor_backend == "ray":
        raise ConfigError(
            "distributed_executor_backend: the ranks of a replica on GPUs are processes; use mp"
        )
    return {"num_cpus": 1, "num_gpus": config.num_ranks}
