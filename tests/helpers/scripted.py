"""An engine that follows a script, for failures whose moment a real engine does not let a test choose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, cast

import httpx
import uvicorn

from api.admission import Admission, QueueLimits
from api.app import create_app
from api.server import SEND_SECONDS, Server
from api.slow_readers import SlowReaderProtocol, SlowReaders
from engine.config import EngineConfig
from engine.core.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
)
from engine.core.pooling_params import PoolingParams
from engine.core.sampling_params import SamplingParams
from engine.core.stats import EngineStats
from engine.core.step_trace import Trace
from engine.core.validation import validate_request
from engine.frontend.chat_format import ChatFormat

Script = Callable[[list[int], SamplingParams], AsyncGenerator[CompletionOutput, None]]
"""What comes of a prompt. One whose first sample has no token and no end: the prompt is being computed."""


class BytesTokenizer:
    """Tokens are bytes."""

    special_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode(errors="replace")

    def piece(self, token_id: int) -> str:
        return chr(token_id)

    eos_token_ids: tuple[int, ...] = ()
    vocab_size = 256

    def special_token_id(self, text: str) -> int | None:
        return None

    def apply_chat_template(self, messages: list[dict[str, Any]], **template_arguments: Any) -> str:
        return "".join(message["content"] or "" for message in messages)


class ScriptedEngine:
    """Yields what `script` yields, and counts how requests open and close."""

    def __init__(self, script: Script, status: Literal["starting", "ready", "dead"] = "ready") -> None:
        self.script = script
        self.status = status
        self.error: str | None = None
        self.tokenizer: Any = BytesTokenizer()
        self.chat_format = ChatFormat(self.tokenizer)
        self.max_model_len = 100
        self.default_params: dict[str, Any] = {}
        self.stats = EngineStats()
        self.identity = "script"
        self.config = EngineConfig(model="script")
        self.num_opened = 0
        self.num_closed = 0
        self.closed = asyncio.Event()

    async def check(self, prompt: list[int], params: SamplingParams) -> None:
        """As the real one refuses what does not fit."""
        validate_request(
            prompt, params, self.max_model_len, self.tokenizer.vocab_size, self.tokenizer.eos_token_ids, False
        )

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        *,
        cache_salt: str = "",
        owner: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        await self.check(prompt, params)
        self.num_opened += 1
        try:
            async for sample in self.script(prompt, params):
                error = "the sampler failed" if sample.finish_reason == "error" else None
                outputs = [sample] if sample.token_ids or sample.finish_reason else []
                yield RequestOutput(request_id, None, prompt, outputs, error=error)
        finally:
            self._close()

    async def embed(
        self,
        prompt: list[int],
        params: PoolingParams,
        request_id: str,
        priority: int = 0,
        *,
        owner: str = "",
    ) -> EmbeddingRequestOutput:
        """The last of the script's token ids as a vector."""
        self.num_opened += 1
        try:
            numbers: list[float] = []
            error = None
            async for sample in self.script(prompt, SamplingParams()):
                numbers = [float(token_id) for token_id in sample.token_ids]
                error = "the state is not finite" if sample.finish_reason == "error" else None
            return EmbeddingRequestOutput(request_id, None, prompt, EmbeddingOutput(numbers), error=error)
        finally:
            self._close()

    async def traces(self, seconds: float) -> list[Trace]:
        return [Trace(now=0)]

    def _close(self) -> None:
        self.num_closed += 1
        if self.num_closed == self.num_opened:
            self.closed.set()


@asynccontextmanager
async def serving(
    engine: ScriptedEngine,
    limits: QueueLimits | None = None,
    send_seconds: float = SEND_SECONDS,
    **application: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that runs in this event loop in front of `engine`.

    Args:
        application: Further arguments of `create_app`.
    """
    admission = Admission(lambda: engine.stats, limits)
    app = create_app(cast(Any, engine), served_model_names=["scripted"], admission=admission, **application)
    readers = SlowReaders(send_seconds, app.state.metrics.count_slow_reader)
    http = cast(Any, partial(SlowReaderProtocol, readers=readers))
    server = Server(uvicorn.Config(app, http=http, port=0, lifespan="off", log_config=None))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            yield client
    finally:
        server.should_exit = True
        await task
