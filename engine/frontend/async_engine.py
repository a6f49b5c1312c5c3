"""AsyncEngine: EngineCore in a child process, and streams of its outputs for asyncio code."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import count
from typing import Any, Literal, Protocol, TypeVar

import engine.errors
from engine.cache_directory import caching_in
from engine.config import EngineConfig
from engine.core.bans import TokenSequence
from engine.core.outputs import EmbeddingRequestOutput, RequestOutput
from engine.core.pooling_params import PoolingParams
from engine.core.random import request_seed
from engine.core.request import EngineOutput, Request
from engine.core.sampling_params import SamplingParams
from engine.core.stats import EngineInfo, EngineStats
from engine.core.step_trace import Trace
from engine.core.structured_outputs import StructuredOutputs
from engine.core.validation import validate_embedding, validate_request
from engine.errors import EngineDeadError, EngineError, EngineStartError
from engine.executor.ranks.limits import BEAT_SECONDS, Limits
from engine.frontend.chat_format import ChatFormat
from engine.frontend.child import EngineChild, end_process, launch
from engine.frontend.embedding import EmbeddingProcessor, embedding_request
from engine.frontend.grammar import FormChecker
from engine.frontend.inbox import Inbox
from engine.frontend.messages import (
    Abort,
    Add,
    Died,
    EndTokens,
    FromEngine,
    GetTrace,
    Learn,
    Outputs,
    Ready,
    Start,
    StartFailed,
    ToEngine,
    Traced,
    beat_decoder,
    encode,
    from_engine_decoder,
)
from engine.frontend.output_processor import OutputProcessor
from engine.loading.resolve import resolve_model
from engine.process import ProcessClock, exit_cause
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer

Result = TypeVar("Result")

MAX_UNREAD_OUTPUTS = 4096
"""Outputs of a request that are kept for who does not take them: what a client that stops reading costs at most."""


class ServedEngine(Protocol):
    """What the API asks of an engine, wherever that is; see `AsyncEngine`."""

    @property
    def status(self) -> Literal["starting", "ready", "restarting", "dead"]: ...

    @property
    def error(self) -> str | None: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def default_params(self) -> dict[str, Any]: ...

    @property
    def chat_format(self) -> ChatFormat: ...

    @property
    def identity(self) -> str: ...

    @property
    def config(self) -> EngineConfig: ...

    async def check(self, prompt: list[int], params: SamplingParams) -> None: ...

    def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        *,
        cache_salt: str = "",
        owner: str = "",
    ) -> AsyncGenerator[RequestOutput]: ...

    async def embed(
        self,
        prompt: list[int],
        params: PoolingParams,
        request_id: str,
        priority: int = 0,
        *,
        owner: str = "",
    ) -> EmbeddingRequestOutput: ...

    async def traces(self, seconds: float) -> list[Trace]: ...


class AsyncEngine:
    """Sends requests to an engine process and hands out what comes back.

    The process is rank 0, and starts the other ranks; one that ends or falls silent is the end of all of them.

    Args:
        limits: How long it may be silent.
        command: What starts the process; two addresses are added.
        child: The process, if it has been started.

    Attributes:
        status: "starting" until the model is loaded, "dead" once the process has ended.
        error: Why it is dead.
        stats: As of the engine's last step.
        ended: Set once it is dead.
        tokenizer, chat_format, max_model_len, vocab_size, hidden_size, default_params, identity, info: Valid once
            ready.
    """

    tokenizer: Tokenizer
    chat_format: ChatFormat
    max_model_len: int
    vocab_size: int
    hidden_size: int
    default_params: dict[str, Any]
    identity: str
    info: EngineInfo

    def __init__(
        self,
        config: EngineConfig,
        limits: Limits | None = None,
        command: Sequence[str] | None = None,
        child: EngineChild | None = None,
    ) -> None:
        self.config = config
        self._limits = Limits() if limits is None else limits
        self._command, self._child = command, child
        self.status: Literal["starting", "ready", "dead"] = "starting"
        self.error: str | None = None
        self.stats = EngineStats()
        self.ended = asyncio.Event()
        self._inboxes: dict[str, Inbox[EngineOutput]] = {}
        self._tracing: deque[asyncio.Future[Trace]] = deque()
        self._arrivals = count()
        self._forms: FormChecker
        self._teaching: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def requests_under_way(self) -> frozenset[str]:
        """Ids of the requests in the step that runs, or that ran when the process ended."""
        return frozenset() if self._child is None else self._child.page.read()

    async def start(self, like: AsyncEngine | None = None) -> None:
        """Loads the model in the child process; starts that if nobody has.

        Args:
            like: An engine of the same model, which has read the vocabulary.

        Raises:
            EngineError: Of the type the engine failed with; EngineStartError if it is none of ours.
        """
        try:
            if self._child is None:
                self._child = await launch(self._command)
            self._tasks.append(asyncio.create_task(self._watch(self._child)))
            with caching_in(self.config.cache_dir):
                path = await _in_daemon_thread(lambda: resolve_model(self.config.model))
                await self._send(Start(options=dataclasses.asdict(self.config), path=str(path)))
                if like is None:
                    self.tokenizer = await _in_daemon_thread(
                        lambda: load_tokenizer(path, self.config.load_format == "dummy")
                    )
            if like is None:
                self.chat_format = await _in_daemon_thread(
                    lambda: ChatFormat(self.tokenizer, self.config.tool_format, self.config.reasoning_format)
                )
                await _in_daemon_thread(lambda: self.tokenizer.bound)
            else:
                self.tokenizer, self.chat_format = like.tokenizer, like.chat_format
            # An engine that has failed meanwhile has said why.
            with contextlib.suppress(EngineDeadError):
                await self._send(EndTokens(list(self.tokenizer.eos_token_ids)))
            message = await self._receive()
            if isinstance(message, Ready):
                self.stats = message.stats
                # Both sockets have their other ends then.
                await self._heard.wait()
                if self.error is not None:
                    raise EngineDeadError(self.error)
            # Both ends hold the sockets: there is no way in any more.
            self._child.directory.cleanup()
        except BaseException as error:
            self._die(f"the engine did not start: {error}")
            await self.shutdown()
            raise
        if isinstance(message, StartFailed):
            self._die(f"the engine did not start: {message.kind}: {message.message}")
            await self.shutdown()
            raise _start_error(message)
        assert isinstance(message, Ready)
        info = message.info
        self.max_model_len, self.vocab_size = info.max_model_len, info.vocab_size
        self.hidden_size, self.default_params = info.hidden_size, info.default_params
        self.identity, self.info = info.identity, info
        self.tokenizer.max_tokens = info.max_model_len
        self._forms = FormChecker(self.tokenizer, self.vocab_size)
        self.status = "ready"
        self._tasks.append(asyncio.create_task(self._receive_outputs()))

    async def shutdown(self) -> None:
        """Ends the engine process and everything that waits for it. May be called at any time, and twice."""
        self._die("the engine was shut down")
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._child is not None:
            await self._child.end()

    async def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises what `generate` would before it computes anything, for who must answer before the first token."""
        self._check_ready()
        validate_request(
            prompt,
            params,
            self.max_model_len,
            self.vocab_size,
            self.tokenizer.eos_token_ids,
            self.config.clip_max_tokens,
            await self._bad_words(params),
            self.info.max_num_seqs,
        )
        if params.structured_outputs is not None:
            await self._prepare(params.structured_outputs)

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        resumed_token_ids: Sequence[list[int] | None] = (),
        cache_salt: str = "",
        owner: str = "",
    ) -> AsyncGenerator[RequestOutput]:
        """Streams what a request adds, step by step; closing the generator aborts the request.

        Of a prompt that takes several steps, an output without samples says that it waits no longer.

        Args:
            prompt: Text or token ids.
            request_id: Unique among the open requests.
            priority: Smaller is served earlier.
            resumed_token_ids: As in `Request`, for a request that another engine has begun; `params` hold its seed.
            cache_salt, owner: As in `Request`.

        Raises:
            RequestError: The request cannot be served as asked.
            EngineDeadError: The engine has ended; names the cause.
        """
        self._check_ready()
        token_ids = await self._encoded(prompt)
        await self.check(token_ids, params)
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            seed=request_seed(params.seed, self.config.seed, self._arrivals),
            priority=priority,
            resumed_token_ids=list(resumed_token_ids),
            bad_words=await self._bad_words(params),
            cache_salt=cache_salt,
            owner=owner,
        )
        processor = OutputProcessor(request, prompt if isinstance(prompt, str) else None, self.tokenizer)
        inbox = self._open_inbox(request_id, params.n)
        finished = False
        try:
            await self._send(Add(request))
            while not finished:
                for output in await inbox.take():
                    addition = processor.process(output)
                    if processor.stopped_samples:
                        for index in processor.stopped_samples:
                            await self._abort(request_id, index)
                        processor.stopped_samples.clear()
                    if addition is not None:
                        finished = addition.finished
                        yield addition
        finally:
            del self._inboxes[request_id]
            if not finished and self.status == "ready":
                await self._abort(request_id)

    async def embed(
        self,
        prompt: list[int],
        params: PoolingParams,
        request_id: str,
        priority: int = 0,
        *,
        owner: str = "",
    ) -> EmbeddingRequestOutput:
        """The embedding of a prompt; whoever stops waiting for it aborts the request.

        Args:
            prompt: Token ids; errors call them "input".
            request_id, priority, owner: As of `generate`.

        Raises:
            RequestError: The request cannot be served as asked.
            EngineDeadError: The engine has ended; names the cause.
        """
        self._check_ready()
        validate_embedding(prompt, params, self.max_model_len, self.vocab_size, self.hidden_size, "input")
        request = embedding_request(request_id, prompt, params, priority, owner)
        inbox = self._open_inbox(request_id, 1)
        is_finished = False
        try:
            await self._send(Add(request))
            processor = EmbeddingProcessor(request, None, params)
            while True:
                for output in await inbox.take():
                    embedding = processor.process(output)
                    if embedding is not None:
                        is_finished = True
                        return embedding
        finally:
            del self._inboxes[request_id]
            if not is_finished and self.status == "ready":
                await self._abort(request_id)

    async def traces(self, seconds: float) -> list[Trace]:
        """What the engine's last steps did, in a list of one.

        Raises:
            EngineDeadError: The engine has ended.
        """
        self._check_ready()
        future: asyncio.Future[Trace] = asyncio.get_running_loop().create_future()
        self._tracing.append(future)
        try:
            await self._send(GetTrace(seconds))
        except BaseException:
            self._tracing.remove(future)
            raise
        return [await future]

    async def _encoded(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await asyncio.to_thread(self.tokenizer.encode, prompt)
        return prompt

    async def _bad_words(self, params: SamplingParams) -> tuple[TokenSequence, ...]:
        if not params.bad_words:
            return ()
        return await asyncio.to_thread(self.tokenizer.encode_bad_words, params.bad_words)

    def _open_inbox(self, request_id: str, num_samples: int) -> Inbox[EngineOutput]:
        assert request_id not in self._inboxes, f"request id {request_id!r} is in use"
        inbox = self._inboxes[request_id] = Inbox(MAX_UNREAD_OUTPUTS * num_samples)
        return inbox

    async def _prepare(self, structured: StructuredOutputs) -> None:
        """Checks a form, in a thread, and lets the engine know the vocabulary, once.

        Raises:
            RequestError: It cannot be kept.
        """
        await asyncio.to_thread(self._forms.check, structured)
        if self._teaching is None:
            self._teaching = asyncio.create_task(self._teach())
        await asyncio.shield(self._teaching)

    async def _teach(self) -> None:
        await self._send(Learn(await asyncio.to_thread(self.tokenizer.vocabulary)))

    async def _abort(self, request_id: str, index: int | None = None) -> None:
        # An engine that has just ended has nothing left to abort.
        with contextlib.suppress(EngineDeadError):
            await self._send(Abort(request_id, index))

    def _check_ready(self) -> None:
        if self.status == "starting":
            raise EngineDeadError("the engine is still loading the model")
        if self.status == "dead":
            raise EngineDeadError(self.error)

    async def _send(self, message: ToEngine) -> None:
        """Sends, unless the process has ended: a pair socket waits for a peer, and would wait forever.

        Raises:
            EngineDeadError: The process has ended.
        """
        assert self._child is not None
        sending = asyncio.ensure_future(self._child.socket.send(encode(message)))
        if not sending.done():  # as it mostly is
            await asyncio.wait((sending, self._child.exited), return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            sending.cancel()
            raise self._exit_error()

    async def _receive(self) -> FromEngine:
        """The next message of the engine.

        Raises:
            EngineDeadError: The process ended instead of sending one.
        """
        assert self._child is not None
        message = asyncio.ensure_future(self._child.socket.recv())
        try:
            await asyncio.wait((message, self._child.exited), return_when=asyncio.FIRST_COMPLETED)
            if not message.done():
                # What the process sent with its last breath may still be on its way.
                await asyncio.wait((message,), timeout=0.2)
            if message.done():
                return from_engine_decoder.decode(message.result())
            raise self._exit_error()
        finally:
            message.cancel()

    def _exit_error(self) -> EngineDeadError:
        assert self._child is not None
        # It may have been ended for something that is known already.
        cause = exit_cause(self._child.exited.result())
        return EngineDeadError(self.error or f"rank 0 {cause} {self._when()}")

    def _when(self) -> str:
        return f"after step {self.stats.num_steps}" if self.status == "ready" else "while it started"

    async def _watch(self, child: EngineChild) -> None:
        """Ends the process once it is silent or has failed."""
        clock, heard = ProcessClock(child.process.pid, 2 * BEAT_SECONDS), 0.0
        while self.status != "dead":
            has_beat = await child.beats.poll(int(1000 * BEAT_SECONDS))
            now = clock.tick()
            limit = self._limits.silence if self.status == "ready" else self._limits.start
            if has_beat:
                heard = now
                self._heard.set()
                message = beat_decoder.decode(await child.beats.recv())
                if isinstance(message, Died):
                    self._die(message.reason)
            elif now - heard > limit:
                self._die(f"rank 0 has been silent for {limit:g} s {self._when()}")
                child.process.kill()
        self._heard.set()
        await end_process(child.process)

    async def _receive_outputs(self) -> None:
        while True:
            try:
                message = await self._receive()
            except Exception as error:
                # Whatever it is, nobody else would tell those who wait.
                self._die(
                    str(error) if isinstance(error, EngineDeadError) else f"{type(error).__name__}: {error}"
                )
                return
            match message:
                case Outputs(outputs, stats):
                    self.stats = stats
                    for output in outputs:
                        inbox = self._inboxes.get(output.request_id)
                        if inbox is None:
                            continue
                        if len(inbox) < inbox.most:
                            inbox.put(output)
                        elif len(inbox) == inbox.most:
                            await self._end_unread(output, inbox)
                case Traced(trace):
                    future = self._tracing.popleft()
                    if not future.done():
                        future.set_result(trace)
                case Died(reason):
                    self._die(reason)
                    return

    async def _end_unread(self, output: EngineOutput, inbox: Inbox[EngineOutput]) -> None:
        """Ends a request of which nobody reads what comes."""
        await self._abort(output.request_id)
        error = f"the client has left {inbox.most} outputs unread"
        inbox.put(
            EngineOutput(request_id=output.request_id, index=output.index, finish_reason="error", error=error)
        )

    def _die(self, reason: str) -> None:
        if self.status == "dead":
            return
        self.status, self.error = "dead", reason
        self.ended.set()
        for inbox in self._inboxes.values():
            inbox.close(EngineDeadError(reason))
        for future in self._tracing:
            if not future.done():
                future.set_exception(EngineDeadError(reason))


async def _in_daemon_thread(function: Callable[[], Result]) -> Result:
    """Like asyncio.to_thread, but a program that ends does not wait for it: a download may take hours."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(error: BaseException | None, result: Result | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        error, result = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        # The loop may have been closed in the meantime: then nobody waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, error, result)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    return await future


def _start_error(message: StartFailed) -> EngineError:
    kind = getattr(engine.errors, message.kind, None)
    if isinstance(kind, type) and issubclass(kind, EngineError):
        return kind(message.message)
    return EngineStartError(f"{message.kind}: {message.message}")
