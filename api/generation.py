"""The one request inside the API, and its way through the engine: endpoints translate into it and out of it."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from api.admission import Place
from api.errors import ApiError
from api.keys import Client
from api.service import Service
from engine.core.outputs import CompletionOutput, Logprob, RequestOutput
from engine.core.sampling_params import SamplingParams

Result = TypeVar("Result")

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
        timeout: Seconds after the arrival in which it must have ended; None: any.
        key: Its name inside the engine: the request's id with an addition, as clients may choose the same one twice.
        arrival: When the request came, in seconds of `time.perf_counter`.
    """

    request_id: str
    client: Client
    model: str
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    arrival: float
    priority: int = 0
    cache_salt: str = ""
    timeout: float | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.request_id}#{secrets.token_hex(8)}")

    @property
    def num_samples(self) -> int:
        """How many are drawn from each prompt."""
        return self.params[0].n


def new_id(kind: str) -> str:
    """An id for a request or a part of an answer, such as chatcmpl-5f0c…; `kind` is what stands before the digits."""
    return f"{kind}{secrets.token_hex(16)}"


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


def check_room(service: Service, generation: Generation) -> None:
    """Refuses what `generate` would refuse for want of room, for who must answer before the first token.

    Raises:
        ApiError: 429, too much waits already.
    """
    check_queue(service, generation.prompts, generation.num_samples)


def check_queue(service: Service, prompts: Sequence[list[int]], num_samples: int) -> None:
    """Refuses prompts for which the queue has no room, and counts them.

    Raises:
        ApiError: 429, too much waits already.
    """
    try:
        service.admission.check_room([len(prompt) for prompt in prompts], num_samples)
    except ApiError as error:
        service.metrics.count_refusal(str(error.code))
        raise


def generate(service: Service, generation: Generation) -> PromptOutputs:
    """Runs all prompts at once and yields what is new as (index of the prompt, output).

    Closing it, or the failure of one prompt, aborts all of them.

    Raises:
        RequestError: A prompt that the engine refuses.
        EngineDeadError: The engine has ended.
        ApiError: 500, a prompt failed inside the engine; 429, too much waits already; 503, it has waited too long;
            408, the time that it was given is over.
    """
    if len(generation.prompts) > 1:
        return _merge(service, generation)
    return _outputs(service, generation, 0)


def _enter(service: Service, generation: Generation) -> list[Place]:
    """Counts the prompts in, if there is room: before anybody else is asked, so that the bound holds.

    Raises:
        ApiError: 429, too much waits already.
    """
    check_room(service, generation)
    return [service.admission.enter(len(prompt), generation.num_samples) for prompt in generation.prompts]


async def _outputs(
    service: Service, generation: Generation, index: int, place: Place | None = None
) -> PromptOutputs:
    """As `generate`, of one prompt; without a place, of the only one."""
    prompt, params = generation.prompts[index], generation.params[index]
    admission, client, is_taken = service.admission, generation.client, False
    if place is None:
        (place,) = _enter(service, generation)
    stream = service.engine.generate(
        prompt,
        params,
        f"{generation.key}-{index}",
        generation.priority,
        cache_salt=generation.cache_salt,
        owner=client.share,
    )
    try:
        with service.metrics.observing(generation.arrival, len(prompt), params.n) as observe:
            async with aclosing(stream):
                while (output := await _next(service, generation, stream, place)) is not None:
                    place.waits = False
                    if not output.outputs and output.error is None:
                        continue  # its prompt is being computed
                    observe(output)
                    if output.error is not None:
                        raise ApiError(500, output.error, code="generation_failed")
                    if not is_taken:
                        is_taken = True
                        client.charge(len(prompt))
                        service.metrics.observe_prediction(admission.margin * place.predicted)
                    if output.outputs:
                        client.charge(sum([len(sample.token_ids) for sample in output.outputs]))
                        if not place.has_begun:
                            admission.begin(place)
                        num_ended = sum([sample.finish_reason is not None for sample in output.outputs])
                        if num_ended:
                            admission.end_samples(place, num_ended)
                    if output.finished:
                        admission.leave(place)
                    yield index, output
    finally:
        admission.leave(place)


def _next(
    service: Service, generation: Generation, outputs: AsyncGenerator[RequestOutput, None], place: Place
) -> Awaitable[RequestOutput | None]:
    """The next output, if it comes in time; None at the end.

    Raises:
        ApiError: 408, the time of the request is over; 503, its prompt has waited too long.
    """
    has_limit = generation.timeout is not None or (
        place.waits and service.admission.queue_timeout is not None
    )
    work = anext(outputs, None)
    return in_time(service, work, generation.arrival, generation.timeout, place) if has_limit else work


async def in_time(
    service: Service, work: Awaitable[Result], arrival: float, timeout: float | None, place: Place
) -> Result:
    """The result of `work`, if it comes in time.

    Args:
        arrival: When the request came, and `timeout` began, the seconds that it has asked for.
        place: What --queue-timeout counts for, from its entering on and as long as it waits.

    Raises:
        ApiError: 408, the time of the request is over; 503, it has waited too long.
    """
    longest = service.admission.queue_timeout if place.waits else None
    end = math.inf if timeout is None else arrival + timeout
    last_wait = math.inf if longest is None else place.entered + longest
    try:
        left = min(end, last_wait) - time.perf_counter()
        if left <= 0:
            raise TimeoutError
        async with asyncio.timeout(None if left == math.inf else left):
            return await work
    except TimeoutError:
        if last_wait < end:
            service.metrics.count_refusal("queue_timeout")
            raise service.admission.waited_too_long() from None
        raise ApiError(
            408,
            f"timeout: the request has not ended within its {timeout:g} s",
            param="timeout",
            code="timeout",
            headers={"x-should-retry": "false"},
        ) from None


async def note_prompt_logprobs(outputs: PromptOutputs, noted: dict[int, PromptLogprobs]) -> PromptOutputs:
    """Passes outputs on, and notes by the index of their prompt the log-probabilities that come with them."""
    async with aclosing(outputs):
        async for index, output in outputs:
            if output.prompt_logprobs is not None:
                noted[index] = output.prompt_logprobs
            yield index, output


async def _merge(service: Service, generation: Generation) -> PromptOutputs:
    """As `generate`, of several prompts; None in the queue is the end of one."""
    places = _enter(service, generation)
    streams = [_outputs(service, generation, index, place) for index, place in enumerate(places)]
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(len(streams))

    async def pump(stream: PromptOutputs) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put(item)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
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
        # A task that was cancelled before it began has left nothing.
        for place in places:
            service.admission.leave(place)


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
