"""The one request inside the API, and its way through the engine: endpoints translate into it and out of it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from api.errors import ApiError
from api.keys import Client
from api.service import Service
from engine.core.outputs import CompletionOutput, Logprob, RequestOutput
from engine.core.sampling_params import SamplingParams

PromptOutputs = AsyncGenerator[tuple[int, RequestOutput], None]
PromptLogprobs = list[dict[int, Logprob] | None]
"""As in `RequestOutput.prompt_logprobs`."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What every endpoint that generates text makes of a body.

    Attributes:
        created: When, in seconds since 1970.
        model: The name to answer under.
        client: Who asks.
        prompts: Token ids.
        params: One for each prompt; all have the same n.
        priority: Lower goes first.
        cache_salt: As in `engine.core.request.Request`.
        key: Its name inside the engine: the request's id with an addition, as clients may choose the same one twice.
        arrival: When, in seconds of `time.perf_counter`.
    """

    request_id: str
    client: Client
    model: str
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    priority: int = 0
    cache_salt: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(init=False)
    arrival: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.request_id}#{uuid.uuid4().hex[:16]}")

    @property
    def num_samples(self) -> int:
        """How many are drawn from each prompt."""
        return self.params[0].n


def new_id(kind: str) -> str:
    """An id for a request or a part of an answer, such as chatcmpl-5f0c…; `kind` is what stands before the digits."""
    return f"{kind}{uuid.uuid4().hex}"


class TokenCounter:
    """Counts and times the tokens of one generation; a prompt counts once, whatever its n.

    Attributes:
        first, last: When the first output and the last so far came, in seconds since the request did; None: none has.
    """

    def __init__(self, generation: Generation) -> None:
        self._arrival = generation.arrival
        self.first: float | None = None
        self.last: float | None = None
        self.num_prompt_tokens = sum(map(len, generation.prompts))
        self.num_completion_tokens = 0
        self._num_cached_tokens = [0] * len(generation.prompts)

    def add_prompt(self, prompt_index: int, output: RequestOutput) -> None:
        """Counts what the output says of its prompt."""
        # The first sample's: the others find the blocks that it has just computed.
        for sample in output.outputs:
            if sample.index == 0:
                self._num_cached_tokens[prompt_index] = output.num_cached_tokens

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Counts all of the output."""
        self.add_prompt(prompt_index, output)
        for sample in output.outputs:
            self.num_completion_tokens += len(sample.token_ids)
        if output.outputs:
            self.last = time.perf_counter() - self._arrival
            if self.first is None:
                self.first = self.last

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(self._num_cached_tokens)


async def generate(service: Service, generation: Generation) -> PromptOutputs:
    """Runs all prompts at once and yields what is new as (index of the prompt, output).

    Closing it, or the failure of one prompt, aborts all of them.

    Raises:
        RequestError: A prompt that the engine refuses.
        EngineDeadError: The engine has ended.
        ApiError: 500, a prompt failed inside the engine.
    """
    streams = [
        service.metrics.observe(
            service.engine.generate(
                prompt,
                params,
                f"{generation.key}-{index}",
                generation.priority,
                cache_salt=generation.cache_salt,
                owner=generation.client.owner,
            ),
            len(prompt),
            params.n,
        )
        for index, (prompt, params) in enumerate(zip(generation.prompts, generation.params, strict=True))
    ]
    generation.client.charge(sum(map(len, generation.prompts)))
    merged = _numbered(streams[0]) if len(streams) == 1 else _merge(streams)
    async with aclosing(merged):
        async for index, output in merged:
            if output.error is not None:
                raise ApiError(500, output.error, code="generation_failed")
            generation.client.charge(sum(len(sample.token_ids) for sample in output.outputs))
            yield index, output


async def note_prompt_logprobs(outputs: PromptOutputs, noted: dict[int, PromptLogprobs]) -> PromptOutputs:
    """Passes outputs on, and notes by the index of their prompt the log-probabilities that come with them."""
    async with aclosing(outputs):
        async for index, output in outputs:
            if output.prompt_logprobs is not None:
                noted[index] = output.prompt_logprobs
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
    generation: Generation, outputs: PromptOutputs, counter: TokenCounter
) -> list[CompletionOutput]:
    """Whole samples, prompt after prompt."""
    num_samples = generation.num_samples
    samples = [CompletionOutput(index) for index in range(len(generation.prompts) * num_samples)]
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
                if new.cumulative_logprob is not None:
                    sample.cumulative_logprob = (sample.cumulative_logprob or 0.0) + new.cumulative_logprob
                sample.finish_reason = new.finish_reason
                sample.stop_reason = new.stop_reason
    for sample, pieces in zip(samples, texts, strict=True):
        sample.text = "".join(pieces)
    return samples
