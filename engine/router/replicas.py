"""Replicas of an engine, each an actor of Ray Serve, and all of them as one engine that outlives each.

What is sent of each open request is kept: prompt, seed and tokens. If a replica dies, what was open there goes on at
another: a draw is a function of seed, sample and position alone, so that under int8 the tokens are those that the
first replica would have drawn.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any, Literal

import ray
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from engine.config import EngineConfig
from engine.core.outputs import RequestOutput
from engine.core.random import derive_seed
from engine.core.sampling_params import SamplingParams
from engine.core.stats import EngineStats
from engine.core.validation import validate_request
from engine.errors import EngineDeadError
from engine.frontend.async_engine import AsyncEngine
from engine.frontend.chat_format import ChatFormat
from engine.loading.resolve import resolve_model
from engine.router.affinity import Resumable
from engine.router.policies import QUEUED_TOKENS
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

MAX_LOSSES = 4
"""So many replicas may die under a request, which is then held to be the cause."""

UNAVAILABLE_SECONDS = 2.0
"""How long a replica is left alone that cannot be reached, and may be again."""

STATS_SECONDS = 1.0

LOST = (RayActorError, EngineDeadError)
"""What a stream ends in when its replica, or the engine process of that, has died."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What the ingress has to know of the engines, which are all alike."""

    max_model_len: int
    vocab_size: int
    default_params: dict[str, Any]
    clips_max_tokens: bool
    identity: str


class Replica:
    """An engine in an actor's process.

    Args:
        options: The fields of EngineConfig.
    """

    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        # Ranks that are Ray actors join the cluster of this one.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        self._name = serve.get_replica_context().replica_id.unique_id
        self._waiting: dict[str, int] = {}
        self._engine = AsyncEngine(EngineConfig(**options))
        await self._engine.start()

    async def info(self) -> ReplicaInfo:
        engine = self._engine
        return ReplicaInfo(
            engine.max_model_len,
            engine.vocab_size,
            engine.default_params,
            engine.config.clip_max_tokens,
            engine.identity,
        )

    async def stats(self) -> EngineStats:
        return self._engine.stats

    async def check_health(self) -> None:
        """Ray Serve replaces a replica whose engine is dead."""
        if self._engine.status == "dead":
            raise EngineDeadError(self._engine.error)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {QUEUED_TOKENS: float(sum(self._waiting.values()))}

    async def generate(self, request: Resumable) -> AsyncGenerator[str | RequestOutput]:
        """The replica's name, then what the request adds, as `AsyncEngine.generate` has it but for the prompt."""
        yield self._name
        key = f"{request.request_id}-{len(request.lost)}"
        self._waiting[key] = len(request.prompt_token_ids) + request.num_output_tokens
        is_first = True
        outputs = self._engine.generate(
            request.prompt_token_ids,
            request.params,
            key,
            request.priority,
            request.resumed_token_ids,
            request.cache_salt,
        )
        try:
            async for output in outputs:
                num_computed = sum(len(sample.token_ids) for sample in output.outputs)
                if is_first:
                    num_computed += len(request.prompt_token_ids)
                    is_first = False
                self._waiting[key] = max(0, self._waiting[key] - num_computed)
                yield replace(output, prompt_token_ids=[])
        finally:
            await outputs.aclose()
            del self._waiting[key]

    async def __del__(self) -> None:
        await self._engine.shutdown()


class Replicas:
    """All replicas as one engine; see `engine.frontend.async_engine.ServedEngine`.

    Args:
        handle: Of the deployment of `Replica`.

    Attributes:
        status: "starting" also while every replica is being replaced.
        error: Why it could not be started.
        stats: Sums over the replicas, as of a second ago; cumulative counts of a replica go with it.
    """

    tokenizer: Tokenizer
    chat_format: ChatFormat
    max_model_len: int
    vocab_size: int
    default_params: dict[str, Any]
    identity: str

    def __init__(self, config: EngineConfig, handle: DeploymentHandle) -> None:
        self.config = config
        self.status: Literal["starting", "ready", "dead"] = "starting"
        self.error: str | None = None
        self.stats = EngineStats()
        self._handle = handle
        self._arrivals = count()
        self._watching = asyncio.create_task(self._watch())

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        *,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput]:
        """As `AsyncEngine.generate`; goes on at another replica if one dies.

        Raises:
            RequestError: The request cannot be served as asked.
            EngineDeadError: Several replicas have died under the request.
        """
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        validate_request(
            token_ids,
            params,
            self.max_model_len,
            self.vocab_size,
            self.tokenizer.eos_token_ids,
            self._clips_max_tokens,
        )
        seeded = replace(params, seed=self._seed(params))
        request = Resumable(request_id, token_ids, seeded, priority, cache_salt=cache_salt)
        sent: list[list[int] | None] = [[] for _ in range(params.n)]
        num_cached_tokens: int | None = None
        for num_losses in count(1):
            name = ""
            stream = self._handle.options(stream=True).generate.remote(request)
            try:
                async for said in stream:
                    if isinstance(said, str):
                        name = said
                        continue
                    _note(sent, said)
                    if num_cached_tokens is None:
                        # What a resumed request finds is partly its own.
                        num_cached_tokens = said.num_cached_tokens
                    is_finished = said.error is not None or all(tokens is None for tokens in sent)
                    yield replace(
                        said,
                        request_id=request_id,
                        prompt_token_ids=token_ids,
                        num_cached_tokens=num_cached_tokens,
                        finished=is_finished,
                    )
                    if is_finished:
                        return
            except LOST as error:
                logger.warning("%s: replica %s is lost: %s", request_id, name, _first_line(error))
                if num_losses == MAX_LOSSES:
                    raise EngineDeadError(
                        f"{MAX_LOSSES} replicas have died under the request: {_first_line(error)}"
                    ) from None
                if isinstance(error, ActorUnavailableError):
                    await asyncio.sleep(UNAVAILABLE_SECONDS)
                    name = ""
            finally:
                stream.cancel()
            request = replace(
                request,
                lost=(*request.lost, name),
                resumed_token_ids=[None if tokens is None else list(tokens) for tokens in sent],
            )

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        if self.config.seed is not None:
            return derive_seed(self.config.seed, next(self._arrivals))
        return secrets.randbits(63)

    async def _watch(self) -> None:
        try:
            path = await asyncio.to_thread(resolve_model, self.config.model)
            self.tokenizer = await asyncio.to_thread(load_tokenizer, path, self.config.load_format == "dummy")
            self.chat_format = await asyncio.to_thread(
                ChatFormat, self.tokenizer, self.config.tool_format, self.config.reasoning_format
            )
            info = await self._handle.info.remote()
        except Exception as error:
            self.status, self.error = "dead", f"{type(error).__name__}: {_first_line(error)}"
            raise
        self.max_model_len, self.vocab_size = info.max_model_len, info.vocab_size
        self._clips_max_tokens = info.clips_max_tokens
        self.default_params, self.identity = info.default_params, info.identity
        while True:
            try:
                answers = await self._handle.broadcast("stats").results_async(
                    timeout_s=10 * STATS_SECONDS, return_exceptions=True
                )
            except (RayError, RayServeException, TimeoutError):
                answers = []
            living = [answer for answer in answers if isinstance(answer, EngineStats)]
            self.status = "ready" if living else "starting"
            self.stats = _sum(living)
            await asyncio.sleep(STATS_SECONDS)


def _note(sent: list[list[int] | None], output: RequestOutput) -> None:
    for sample in output.outputs:
        tokens = sent[sample.index]
        assert tokens is not None, "a sample that has ended goes on"
        tokens += sample.token_ids
        if sample.finish_reason is not None:
            sent[sample.index] = None


def _sum(stats: list[EngineStats]) -> EngineStats:
    names = [field.name for field in fields(EngineStats)]
    total = EngineStats(**{name: sum(getattr(one, name) for one in stats) for name in names})
    total.kv_cache_usage_perc /= max(1, len(stats))
    return total


def _first_line(error: BaseException) -> str:
    # Ray wraps what a replica raised in a text with its stack.
    return str(getattr(error, "cause", error)).strip().partition("\n")[0]
