"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from msgspec import UNSET, UnsetType, structs
from starlette.requests import Request
from starlette.responses import Response

from api.bodies import Completion, CompletionChoice, Usage
from api.body import off_loop
from api.errors import ApiError
from api.generation import (
    Generation,
    PromptLogprobs,
    PromptOutputs,
    TokenCounter,
    collect,
    generate,
    note_prompt_logprobs,
)
from api.keys import Client, client_of
from api.logprobs import CompletionLogprobsFormatter, EchoedPrompt, prompt_logprobs_of
from api.prompts import Prompt, encode_prompts, split_prompts
from api.protocol import CompletionRequest, decode_request
from api.request_fields import answer_id, read_cache_salt, read_timeout, truncated
from api.sampling import named_as_asked, requested_max_tokens, sampling_params
from api.service import Service
from api.streaming import event, event_stream, whole_answer
from api.usage import chunk_usage, has_usage_chunk, timings_of, usage_of
from engine.core.limits import MAX_CHOICES, MAX_SAMPLES
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """A checked request.

    Attributes:
        prompts: As given, for echo; of one that was cut, the tokens that are left.
        prompt_logprobs: By the prompt's index, once they are there.
    """

    request: CompletionRequest
    generation: Generation
    prompts: Sequence[Prompt]
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)

    @property
    def params(self) -> SamplingParams:
        return self.generation.params[0]

    @property
    def num_choices(self) -> int:
        """How many choices there are for each prompt."""
        return self.request.n or 1


async def create_completion(service: Service, http_request: Request) -> Response:
    """Answers one request, whole or as events."""
    service.check_ready()
    async with service.bodies.receive(http_request) as body:
        job = await body.read(lambda data: _read_job(service, client_of(http_request), body.arrival, data))
    outputs = generate(service, job.generation)
    if job.params.prompt_logprobs is not None:
        outputs = note_prompt_logprobs(outputs, job.prompt_logprobs)
    headers = {"x-request-id": job.generation.request_id}
    with named_as_asked(job.request):
        if job.request.stream:
            return await event_stream(http_request.receive, _events(service, job, outputs), headers)
        return await whole_answer(http_request.receive, _whole(service, job, outputs), headers)


def _read_job(service: Service, client: Client, arrival: float, body: bytearray) -> CompletionJob:
    request = decode_request(body, CompletionRequest)
    model = service.check_model(request.model)
    shows_prompt = request.prompt_logprobs is not None or request.echo
    max_tokens = requested_max_tokens(request, least=0 if shows_prompt else 1)
    params = _params(service, request, max_tokens)
    prompts = split_prompts(request.prompt, "prompt")
    if len(prompts) * params.n > MAX_CHOICES:
        raise ApiError(
            400,
            f"prompt and n ask for {len(prompts)} x {params.n} choices; at most {MAX_CHOICES} are given",
            param="prompt",
        )
    token_ids = encode_prompts(service.engine.tokenizer, prompts, request.add_special_tokens is not False)
    kept = [truncated(request, one, service.engine.max_model_len, params.max_tokens) for one in token_ids]
    generation = Generation(
        answer_id(request, "cmpl-"),
        client,
        model,
        kept,
        _fitted(service, max_tokens, params, kept),
        arrival,
        client.priority(request.priority),
        read_cache_salt(request.cache_salt),
        timeout=read_timeout(request.timeout),
    )
    is_cut = (len(left) < len(one) for left, one in zip(kept, token_ids, strict=True))
    shown = [left if cut else prompt for left, cut, prompt in zip(kept, is_cut, prompts, strict=True)]
    return CompletionJob(request, generation, shown)


def _params(service: Service, request: CompletionRequest, max_tokens: int | None) -> SamplingParams:
    params = sampling_params(
        structs.replace(request, prompt_logprobs=_num_prompt_logprobs(request, max_tokens)),
        service.engine.default_params,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        logprobs=request.logprobs,
    )
    if request.best_of is None or request.best_of == params.n:
        return params
    if not params.n < request.best_of <= MAX_SAMPLES:
        raise ApiError(
            400,
            f"best_of must be between n ({params.n}) and {MAX_SAMPLES}, got {request.best_of}",
            param="best_of",
        )
    if request.stream:
        raise ApiError(
            400, "best_of beyond n cannot be streamed: which are the best shows at the end", param="best_of"
        )
    return replace(params, n=request.best_of, logprobs=params.logprobs or 0)


def _num_prompt_logprobs(request: CompletionRequest, max_tokens: int | None) -> int | None:
    """How many likeliest tokens the engine is to find in the place of each of the prompt's; None: it is not asked."""
    asked = [request.prompt_logprobs]
    if request.echo:
        asked.append(0 if request.logprobs is None and max_tokens == 0 else request.logprobs)
    nums = [num for num in asked if num is not None]
    # A negative number is refused, whatever the other one is.
    return min(nums) if any(num < 0 for num in nums) else max(nums, default=None)


def _fitted(
    service: Service, max_tokens: int | None, params: SamplingParams, prompts: Sequence[list[int]]
) -> list[SamplingParams]:
    """The parameters of each prompt: a max_tokens that nobody asked for takes what room there is."""
    if max_tokens is not None:
        return [params] * len(prompts)
    rooms = (service.engine.max_model_len - len(token_ids) for token_ids in prompts)
    return [replace(params, max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room))) for room in rooms]


class ChoiceWriter:
    """Turns samples of one choice into its JSON form, whole or piece by piece."""

    def __init__(self, service: Service, job: CompletionJob, index: int) -> None:
        self._tokenizer = service.engine.tokenizer
        self._index, self._prompt_index = index, index // job.num_choices
        self._job = job
        self._is_first = True
        silent = self._tokenizer.special_token_ids if job.params.skip_special_tokens else frozenset()
        as_ids = job.request.return_tokens_as_token_ids is True
        self._logprobs = CompletionLogprobsFormatter(silent, as_ids)

    @property
    def has_prompt_to_write(self) -> bool:
        """Whether the next piece has the prompt's log-probabilities, which may be many."""
        return self._is_first and bool(self._job.prompt_logprobs)

    def write(self, sample: CompletionOutput) -> CompletionChoice:
        request = self._job.request
        is_first, self._is_first = self._is_first, False
        echoed = self._echoed() if is_first and request.echo else None
        stop_reason = UNSET if sample.finish_reason is None else sample.stop_reason
        choice = CompletionChoice(
            index=self._index,
            text=sample.text if echoed is None else echoed.text + sample.text,
            logprobs=self._logprobs.format(sample, echoed),
            finish_reason=sample.finish_reason,
            stop_reason=stop_reason,
            matched_stop=stop_reason,
            token_ids=sample.token_ids if request.return_token_ids else UNSET,
        )
        if is_first and request.return_token_ids:
            choice.prompt_token_ids = self._job.generation.prompts[self._prompt_index]
        if is_first and request.prompt_logprobs is not None:
            logprobs = self._job.prompt_logprobs[self._prompt_index]
            choice.prompt_logprobs = prompt_logprobs_of(logprobs, request.prompt_logprobs)
        return choice

    def _echoed(self) -> EchoedPrompt:
        text = self._job.prompts[self._prompt_index]
        token_ids = self._job.generation.prompts[self._prompt_index]
        return EchoedPrompt(
            text if isinstance(text, str) else self._tokenizer.decode(text, skip_special_tokens=False),
            token_ids,
            self._tokenizer.token_bytes(token_ids[0]),
            self._job.prompt_logprobs.get(self._prompt_index, []),
            self._job.request.logprobs or 0,
        )


async def _whole(service: Service, job: CompletionJob, outputs: PromptOutputs) -> Completion:
    generation, counter = job.generation, TokenCounter(job.generation)
    samples = _best(job, await collect(generation, outputs, counter))

    def write() -> list[CompletionChoice]:
        return [ChoiceWriter(service, job, sample.index).write(sample) for sample in samples]

    choices = await off_loop(bool(job.prompt_logprobs), write)
    return Completion(
        generation.request_id,
        generation.created,
        generation.model,
        choices,
        service.fingerprint,
        usage=usage_of(counter),
        timings=timings_of(counter),
    )


def _best(job: CompletionJob, samples: list[CompletionOutput]) -> list[CompletionOutput]:
    """The choices: where more were drawn, for each prompt those of the largest mean log-probability, best first."""
    num_drawn, num_choices = job.params.n, job.num_choices
    if num_drawn == num_choices:
        return samples
    best = []
    for start in range(0, len(samples), num_drawn):
        best += sorted(samples[start : start + num_drawn], key=_mean_logprob, reverse=True)[:num_choices]
    shows_logprobs = job.request.logprobs is not None
    return [
        replace(sample, index=index, logprobs=sample.logprobs if shows_logprobs else None)
        for index, sample in enumerate(best)
    ]


def _mean_logprob(sample: CompletionOutput) -> float:
    return (sample.cumulative_logprob or 0.0) / max(1, len(sample.token_ids))


async def _events(
    service: Service, job: CompletionJob, outputs: PromptOutputs
) -> AsyncGenerator[bytes, None]:
    generation, options = job.generation, job.request.stream_options
    counter = TokenCounter(generation)
    writers = [ChoiceWriter(service, job, index) for index in range(len(job.prompts) * job.params.n)]
    everything = job.params.logprobs is not None or job.request.return_token_ids

    head = (generation.request_id, generation.created, generation.model)
    fingerprint = service.fingerprint
    num_open = len(writers)

    def chunk(choices: list[CompletionChoice], usage: Usage | UnsetType | None, is_last: bool) -> bytes:
        timings = timings_of(counter) if is_last else UNSET
        return event(Completion(*head, choices, fingerprint, usage=usage, timings=timings))

    async with aclosing(outputs):
        async for prompt_index, output in outputs:
            counter.add(prompt_index, output)
            for sample in output.outputs:
                # A token whose text is held back has nothing to show yet.
                if sample.text or sample.finish_reason or (everything and sample.token_ids):
                    writer = writers[prompt_index * job.params.n + sample.index]
                    num_open -= sample.finish_reason is not None
                    is_last = num_open == 0 and not has_usage_chunk(options)
                    choice = await off_loop(writer.has_prompt_to_write, partial(writer.write, sample))
                    yield chunk([choice], chunk_usage(counter, options), is_last)
    if has_usage_chunk(options):
        yield chunk([], usage_of(counter), True)
