"""The prompts of one HTTP request on their way through the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec import UNSET, UnsetType

from api.bodies import PromptTokensDetails, Usage
from api.errors import ApiError
from api.protocol import StreamOptions
from api.service import Service
from engine.core.outputs import CompletionOutput, RequestOutput
from engine.core.sampling_params import SamplingParams

Prompts = Sequence[list[int]]
PromptOutputs = AsyncGenerator[tuple[int, RequestOutput], None]


class UsageCounter:
    """Counts the tokens of one HTTP request; a prompt counts once, whatever its n."""

    def __init__(self, prompts: Prompts, options: StreamOptions | None = None) -> None:
        self._options = options or StreamOptions()
        self._num_prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._num_cached_tokens = [0] * len(prompts)
        self._num_completion_tokens = 0

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        # The first sample's: the others find the blocks that it has just computed.
        if any(sample.index == 0 for sample in output.outputs):
            self._num_cached_tokens[prompt_index] = output.num_cached_tokens
        self._num_completion_tokens += sum(len(sample.token_ids) for sample in output.outputs)

    @property
    def has_usage_chunk(self) -> bool:
        return bool(self._options.include_usage)

    def chunk_usage(self) -> Usage | UnsetType | None:
        """What the usage field of a chunk that carries choices holds."""
        if self._options.continuous_usage_stats:
            return self.usage()
        return None if self.has_usage_chunk else UNSET

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            total_tokens=self._num_prompt_tokens + self._num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._num_cached_tokens)),
        )


async def generate(
    service: Service,
    prompts: Prompts,
    params: Sequence[SamplingParams],
    request_id: str,
    priority: int | None,
) -> PromptOutputs:
    """Runs all prompts at once and yields what is new as (index of the prompt, output).

    Args:
        params: One for each prompt.

    Closing it, or the failure of one prompt, aborts all of them.

    Raises:
        RequestError: A prompt that the engine refuses.
        EngineDeadError: The engine has ended.
        ApiError: 500, a prompt failed inside the engine.
    """
    streams = [
        service.metrics.observe(
            service.engine.generate(prompt, prompt_params, f"{request_id}-{index}", priority or 0),
            len(prompt),
            prompt_params.n,
        )
        for index, (prompt, prompt_params) in enumerate(zip(prompts, params, strict=True))
    ]
    merged = _numbered(streams[0]) if len(streams) == 1 else _merge(streams)
    async with aclosing(merged):
        async for index, output in merged:
            if output.error is not None:
                raise ApiError(500, output.error, code="generation_failed")
            yield index, output


async def _numbered(stream: AsyncGenerator[RequestOutput, None]) -> PromptOutputs:
    async with aclosing(stream):
        async for output in stream:
            yield 0, output


async def _merge(streams: Sequence[AsyncGenerator[RequestOutput, None]]) -> PromptOutputs:
    """Items of all streams as they come; None in the queue is the end of a stream."""
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(stream):
                async for output in stream:
                    queue.put_nowait((index, output))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    num_open = len(tasks)
    try:
        while num_open:
            match await queue.get():
                case None:
                    num_open -= 1
                case Exception() as error:
                    raise error
                case item:
                    yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(
    outputs: PromptOutputs, num_prompts: int, num_samples: int, counter: UsageCounter
) -> list[CompletionOutput]:
    """Whole samples, prompt after prompt."""
    samples = [CompletionOutput(index) for index in range(num_prompts * num_samples)]
    texts: list[list[str]] = [[] for _ in samples]
    async with aclosing(outputs):
        async for prompt_index, output in outputs:
            counter.add(prompt_index, output)
            for new in output.outputs:
                index = prompt_index * num_samples + new.index
                sample = samples[index]
                texts[index].append(new.text)
                sample.token_ids += new.token_ids
                if new.logprobs is not None:
                    sample.logprobs = (sample.logprobs or []) + new.logprobs
                sample.finish_reason = new.finish_reason
                sample.stop_reason = new.stop_reason
    for sample, pieces in zip(samples, texts, strict=True):
        sample.text = "".join(pieces)
    return samples
