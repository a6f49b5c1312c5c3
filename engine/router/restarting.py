"""An engine that outlives its process: where that dies, another is started, and open requests go on in it.

    client ── request ──▶ RestartingEngine ──▶ AsyncEngine ──▶ engine process ✝
                              │   keeps prompt, seed and tokens
                              └──────────────▶ AsyncEngine ──▶ the next one

A request may be what kills an engine. Those of the step amid which one has died go on one after the other: each when
the one before has a token from the new engine. So a second death shows which it was, and that one alone fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import count
from typing import Any, Literal

from engine.config import EngineConfig
from engine.core.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from engine.core.pooling_params import PoolingParams
from engine.core.sampling_params import SamplingParams
from engine.core.stats import EngineStats
from engine.core.step_trace import Trace
from engine.errors import EngineDeadError, EngineError
from engine.executor.ranks.limits import Limits
from engine.frontend.async_engine import AsyncEngine
from engine.frontend.chat_format import ChatFormat
from engine.frontend.child import EngineChild
from engine.process import RestartLimit
from engine.router.open_request import OpenRequest, seeded
from engine.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

GUILTY = "the engine died twice in a step with this request, which is not tried again; the server's log has the cause"
"""What a client is told: the cause may be an exception's text."""


class RestartingEngine:
    """One engine at a time; see `engine.frontend.async_engine.ServedEngine`.

    Args:
        limits, command, child: As `AsyncEngine` takes them; the child is the first one's.

    Attributes:
        status: "restarting" while an engine is started in the place of one that has died: requests wait for it.
        error: Why the last engine died.
        num_restarts: Engines that were started in the place of another.
        failed: Set once no more are started.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: Limits | None = None,
        command: Sequence[str] | None = None,
        child: EngineChild | None = None,
    ) -> None:
        self.config = config
        self.status: Literal["starting", "ready", "restarting", "dead"] = "starting"
        self.error: str | None = None
        self.num_restarts = 0
        self.failed = asyncio.Event()
        self._limits, self._command = limits, command
        self._engine = AsyncEngine(config, limits, command, child)
        self._limit = RestartLimit(config.max_restarts, config.restart_window)
        self._open: dict[str, OpenRequest] = {}
        self._waiting: dict[OpenRequest, asyncio.Future[AsyncEngine]] = {}
        # Suspects go on one after the other; who has the lock of the engine that runs is at it.
        self._trial = asyncio.Lock()
        self._on_trial: dict[OpenRequest, asyncio.Lock] = {}
        # Requests in whose step an engine has died twice.
        self._guilty: set[OpenRequest] = set()
        self._arrivals = count()
        self._keeping: asyncio.Task[None] | None = None

    @property
    def stats(self) -> EngineStats:
        """As of the last step of the engine that runs; cumulative counts go with an engine."""
        return self._engine.stats

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def chat_format(self) -> ChatFormat:
        return self._engine.chat_format

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def default_params(self) -> dict[str, Any]:
        return self._engine.default_params

    async def start(self) -> None:
        """Starts the first engine; one that fails at that is not started again.

        Raises:
            EngineError: As `AsyncEngine.start`.
        """
        try:
            await self._engine.start()
        except BaseException:
            self.status, self.error = "dead", self._engine.error
            raise
        self.status = "ready"
        self._keeping = asyncio.create_task(self._keep())

    async def shutdown(self) -> None:
        """Ends the engine and all that waits for it. May be called at any time, and twice."""
        keeping, self._keeping = self._keeping, None
        if keeping is not None:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        self._end("the engine was shut down")
        await self._engine.shutdown()

    @property
    def identity(self) -> str:
        return self._engine.identity

    async def check(self, prompt: list[int], params: SamplingParams) -> None:
        """As `AsyncEngine.check`; what cannot be checked while an engine is started again, `generate` refuses."""
        with contextlib.suppress(EngineDeadError):
            await self._engine.check(prompt, params)

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
        """As `AsyncEngine.generate`; goes on where the engine has died and another is there.

        Raises:
            RequestError: The request cannot be served as asked.
            EngineDeadError: Engines have died too often.
        """
        self._check_alive()
        token_ids = (
            await asyncio.to_thread(self.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
        )
        request = OpenRequest(
            request_id,
            token_ids,
            seeded(params, self.config.seed, self._arrivals),
            priority,
            cache_salt,
            owner,
        )
        request.prompt = prompt if isinstance(prompt, str) else None
        with self._opened(request):
            while not request.is_finished:
                engine = await self._living(request)
                if request in self._guilty:
                    yield request.failure(GUILTY)
                    return
                stream = engine.generate(
                    token_ids,
                    request.params,
                    request_id,
                    priority,
                    request.resumed_token_ids,
                    request.cache_salt,
                    owner,
                )
                # Where the engine has died, `_keep` sees it, too, and says how it goes on.
                with contextlib.suppress(EngineDeadError):
                    async with aclosing(stream):
                        async for output in stream:
                            output = request.take(output)
                            if self._on_trial and any(sample.token_ids for sample in output.outputs):
                                self._acquit(request)
                            yield output

    async def embed(
        self,
        prompt: list[int],
        params: PoolingParams,
        request_id: str,
        priority: int = 0,
        *,
        owner: str = "",
    ) -> EmbeddingRequestOutput:
        """As `AsyncEngine.embed`; begins anew where the engine has died and another is there.

        Raises:
            RequestError: The request cannot be served as asked.
            EngineDeadError: Engines have died too often.
        """
        request = OpenRequest(request_id, prompt, SamplingParams(), priority)
        with self._opened(request):
            while True:
                engine = await self._living(request)
                if request in self._guilty:
                    return EmbeddingRequestOutput(request_id, None, prompt, EmbeddingOutput([]), error=GUILTY)
                with contextlib.suppress(EngineDeadError):
                    return await engine.embed(prompt, params, request_id, priority, owner=owner)

    async def traces(self, seconds: float) -> list[Trace]:
        """As `AsyncEngine.traces`, of the engine that runs."""
        return await self._engine.traces(seconds)

    @contextlib.contextmanager
    def _opened(self, request: OpenRequest) -> Iterator[None]:
        assert request.request_id not in self._open, f"request id {request.request_id!r} is in use"
        self._open[request.request_id] = request
        try:
            yield
        finally:
            self._acquit(request)
            del self._open[request.request_id]
            self._guilty.discard(request)

    async def _living(self, request: OpenRequest) -> AsyncEngine:
        """The engine, as soon as it lives and the request may go on in it.

        Suspects do so one after the other, and nothing new joins them before they have a token: another death would
        be blamed on both.

        Raises:
            EngineDeadError: None will.
        """
        self._acquit(request)
        self._check_alive()
        engine = self._engine
        if engine.status != "ready":
            future = self._waiting[request] = asyncio.get_running_loop().create_future()
            try:
                engine = await future
            finally:
                self._waiting.pop(request, None)
        trial = self._trial
        if request.suspected_at is not None and request not in self._guilty:
            await trial.acquire()
            self._on_trial[request] = trial
        elif not request.has_begun:
            async with trial:
                pass
        return engine

    def _check_alive(self) -> None:
        if self.status == "starting":
            raise EngineDeadError("the engine is still loading the model")
        if self.status == "dead":
            raise EngineDeadError(self.error)

    async def _keep(self) -> None:
        """Starts an engine each time one has died, until they die too often."""
        while True:
            await self._engine.ended.wait()
            death = cause = self._engine.error or "the engine has ended"
            self._blame()
            started = False
            while not started:
                # What a start failed of is the log's: anyone may ask for this, and it may name files.
                self.status, self.error = "restarting", death
                if not self._limit.allows_another():
                    self._give_up(cause)
                    return
                logger.error("%s; starting the engine again, %d requests are open", cause, len(self._open))
                await self._engine.shutdown()
                try:
                    await self._restart()
                except Exception as error:
                    # Whatever it is, nobody else would tell those who wait.
                    cause = (
                        str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
                    )
                else:
                    started = True

    async def _restart(self) -> None:
        """Starts an engine like the first, and hands it the requests.

        In order: those that may go on at once, suspects, those that have not begun; of each, first what needs least.
        """
        before, began = self._engine, time.monotonic()
        engine = AsyncEngine(before.info.pinned(self.config), self._limits, self._command)
        try:
            await engine.start(like=before)
        except BaseException:
            await engine.shutdown()
            raise
        self._engine, self.status = engine, "ready"
        self.num_restarts += 1
        logger.info("the engine is ready again after %.1f s", time.monotonic() - began)
        self._trial = asyncio.Lock()
        for request in sorted(self._waiting, key=_turn):
            future = self._waiting[request]
            if not future.done():
                future.set_result(engine)

    def _acquit(self, request: OpenRequest) -> None:
        """Notes that a request has a token from the engine, or has ended there."""
        trial = self._on_trial.pop(request, None)
        if trial is not None:
            trial.release()

    def _blame(self) -> None:
        under_way = self._engine.requests_under_way
        for request in self._open.values():
            if request.blame(request.request_id in under_way):
                self._guilty.add(request)

    def _give_up(self, cause: str) -> None:
        self._end(
            f"{cause}; it has been started again {self.config.max_restarts} times within "
            f"{self.config.restart_window:g} s, and is not any more (--max-restarts, --restart-window)"
        )
        self.failed.set()

    def _end(self, cause: str) -> None:
        if self.status != "dead":
            self.status, self.error = "dead", cause
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineDeadError(self.error))


def _turn(request: OpenRequest) -> tuple[bool, bool, int]:
    return not request.has_begun, request.suspected_at is not None, request.num_tokens
