"""Replicas of an engine, each an actor of Ray Serve, and all of them as one engine that outlives each.

If a replica dies, what was open there goes on at another; see `engine.router.open_request`.
"""

from __future__ import annotations

import asyncio
import logging
import os
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
from engine.core.bans import TokenSequence
from engine.core.outputs import EmbeddingRequestOutput, RequestOutput
from engine.core.pooling_params import PoolingParams
from engine.core.sampling_params import SamplingParams
from engine.core.stats import EngineStats, joined
from engine.core.step_trace import Trace
from engine.core.validation import validate_embedding, validate_request
from engine.errors import EngineDeadError
from engine.frontend.async_engine import AsyncEngine
from engine.frontend.chat_format import ChatFormat
from engine.loading.resolve import resolve_model
from engine.router.affinity import Resumable
from engine.router.open_request import OpenRequest, seeded
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
    hidden_size: int
    max_num_seqs: int
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
            engine.hidden_size,
            engine.info.max_num_seqs,
            engine.default_params,
            engine.config.clip_max_tokens,
            engine.identity,
        )

    async def stats(self) -> EngineStats:
        return self._engine.stats

    async def traces(self, seconds: float) -> list[Trace]:
        return await self._engine.traces(seconds)

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
            request.owner,
        )
        try:
            async for output in outputs:
                num_computed = sum(len(sample.token_ids) for sample in output.outputs)
                if is_first and output.outputs:
                    num_computed += len(request.prompt_token_ids)
                    is_first = False
                self._waiting[key] = max(0, self._waiting[key] - num_computed)
                yield replace(output, prompt_token_ids=[])
        finally:
            await outputs.aclose()
            del self._waiting[key]

    async def embed(
        self, request: Resumable, params: PoolingParams
    ) -> AsyncGenerator[str | EmbeddingRequestOutput]:
        """The replica's name, then what `AsyncEngine.embed` returns, but for the prompt."""
        yield self._name
        key = f"{request.request_id}-{len(request.lost)}"
        self._waiting[key] = len(request.prompt_token_ids)
        try:
            output = await self._engine.embed(
                request.prompt_token_ids, params, key, request.priority, owner=request.owner
            )
            yield replace(output, prompt_token_ids=[])
        finally:
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
    hidden_size: int
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

    async def check(self, prompt: list[int], params: SamplingParams) -> None:
        """As `AsyncEngine.check`, but for the form, which a replica checks."""
        bad_words: tuple[TokenSequence, ...] = ()
        if params.bad_words:
            bad_words = await asyncio.to_thread(self.tokenizer.encode_bad_words, params.bad_words)
        validate_request(
            prompt,
            params,
            self.max_model_len,
            self.vocab_size,
            self.tokenizer.eos_token_ids,
            self._clips_max_tokens,
            bad_words,
            self._max_num_seqs,
        )

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        *,
        cache_salt: str = "",
        owner: str = "",
    ) -> AsyncGenerator[RequestOutput]:
        """As `AsyncEngine.generate`; goes on at another replica if one dies.

        Raises:
            RequestError: The request cannot be served as asked.
            EngineDeadError: Several replicas have died under the request.
        """
        token_ids = (
            await asyncio.to_thread(self.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
        )
        await self.check(token_ids, params)
        request = OpenRequest(
            request_id,
            token_ids,
            seeded(params, self.config.seed, self._arrivals),
            priority,
            cache_salt,
            owner,
        )
        lost: tuple[str, ...] = ()
        for num_losses in count(1):
            name = ""
            resumable = Resumable(
                request_id,
                token_ids,
                request.params,
                priority,
                request.resumed_token_ids,
                lost,
                cache_salt=cache_salt,
                owner=owner,
            )
            stream = self._handle.options(stream=True).generate.remote(resumable)
            try:
                async for said in stream:
                    if isinstance(said, str):
                        name = said
                        continue
                    yield request.take(said)
                    if request.is_finished:
                        return
            except LOST as error:
                name = await _survive(error, request_id, name, num_losses)
            finally:
                stream.cancel()
            lost = (*lost, name)

    async def embed(
        self,
        prompt: list[int],
        params: PoolingParams,
        request_id: str,
        priority: int = 0,
        *,
        owner: str = "",
    ) -> EmbeddingRequestOutput:
        """As `AsyncEngine.embed`; begins anew at another replica if one dies.

        Raises:
            RequestError: The request cannot be served as asked.
            EngineDeadError: Several replicas have died under the request.
        """
        validate_embedding(prompt, params, self.max_model_len, self.vocab_size, self.hidden_size, "input")
        request = Resumable(request_id, prompt, SamplingParams(max_tokens=1), priority, owner=owner)
        for num_losses in count(1):
            name = ""
            stream = self._handle.options(stream=True).embed.remote(request, params)
            try:
                async for said in stream:
                    if not isinstance(said, str):
                        return replace(said, request_id=request_id, prompt_token_ids=prompt)
                    name = said
            except LOST as error:
                name = await _survive(error, request_id, name, num_losses)
            finally:
                stream.cancel()
            request = replace(request, lost=(*request.lost, name))
        raise AssertionError("unreachable")

    async def traces(self, seconds: float) -> list[Trace]:
        """As `AsyncEngine.traces`, of every replica that answers."""
        answers = await self._handle.broadcast("traces", seconds).results_async(
            timeout_s=10 * STATS_SECONDS, return_exceptions=True
        )
        return [trace for answer in answers if isinstance(answer, list) for trace in answer]

    async def _watch(self) -> None:
        try:
            path = await asyncio.to_thread(resolve_model, self.config.model)
            self.tokenizer = await asyncio.to_thread(load_tokenizer, path, self.config.load_format == "dummy")
            self.chat_format = await asyncio.to_thread(
                ChatFormat, self.tokenizer, self.config.tool_format, self.config.reasoning_format
            )
            await asyncio.to_thread(lambda: self.tokenizer.bound)
            info = await self._handle.info.remote()
        except Exception as error:
            self.status, self.error = "dead", f"{type(error).__name__}: {_first_line(error)}"
            raise
        self.max_model_len, self.vocab_size = info.max_model_len, info.vocab_size
        self._clips_max_tokens, self._max_num_seqs = info.clips_max_tokens, info.max_num_seqs
        self.tokenizer.max_tokens = info.max_model_len
        self.hidden_size, self.default_params = info.hidden_size, info.default_params
        self.identity = info.identity
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


async def _survive(error: Exception, request_id: str, name: str, num_losses: int) -> str:
    """Waits where a replica cannot be reached; the name of one that must not be asked again, none if it may.

    Raises:
        EngineDeadError: It was the last loss that a request may have.
    """
    logger.warning("%s: replica %s is lost: %s", request_id, name, _first_line(error))
    if num_losses == MAX_LOSSES:
        raise EngineDeadError(
            f"{MAX_LOSSES} replicas have died under the request: {_first_line(error)}"
        ) from None
    if isinstance(error, ActorUnavailableError):
        await asyncio.sleep(UNAVAILABLE_SECONDS)
        return ""
    return name


def _sum(stats: list[EngineStats]) -> EngineStats:
    names = [field.name for field in fields(EngineStats) if field.name != "load"]
    total = EngineStats(**{name: sum(getattr(one, name) for one in stats) for name in names})
    total.kv_cache_usage_perc /= max(1, len(stats))
    total.load = joined([one.load for one in stats])
    return total


def _first_line(error: BaseException) -> str:
    # Ray wraps what a replica raised in a text with its stack.
    return str(getattr(error, "cause", error)).strip().partition("\n")[0]
