"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from api.bodies import Completion, CompletionChoice, Usage
from api.body import json_response, read_body
from api.errors import ApiError, not_supported
from api.generation import Generation, PromptOutputs, TokenCounter, collect, generate
from api.logprobs import CompletionLogprobsFormatter
from api.protocol import CompletionRequest, decode_request
from api.request_fields import answer_id, cache_salt, truncated
from api.sampling import named_as_asked, requested_max_tokens, sampling_params
from api.service import Service
from api.streaming import event, event_stream, until_disconnect
from api.usage import chunk_usage, has_usage_chunk, timings_of, usage_of
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 2048

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """A checked request.

    Attributes:
        prompts: As given, for echo; of one that was cut, the tokens that are left.
    """

    request: CompletionRequest
    generation: Generation
    prompts: Sequence[Prompt]

    @property
    def params(self) -> SamplingParams:
        return self.generation.params[0]


async def create_completion(service: Service, http_request: Request) -> Response:
    """Answers one request, whole or as events."""
    service.check_ready()
    request = decode_request(await read_body(http_request), CompletionRequest)
    model = service.check_model(request.model)
    max_tokens = requested_max_tokens(request)
    params = _params(service, request, max_tokens)
    prompts = split_prompts(request.prompt)
    if len(prompts) * params.n > MAX_CHOICES:
        raise ApiError(
            400,
            f"prompt and n ask for {len(prompts)} x {params.n} choices; at most {MAX_CHOICES} are given",
            param="prompt",
        )
    adds_special_tokens = request.add_special_tokens is not False
    encode = service.engine.tokenizer.encode
    # In a thread: a long prompt takes long enough to be felt by the streams of others.
    token_ids = await asyncio.to_thread(
        lambda: [
            encode(prompt, adds_special_tokens) if isinstance(prompt, str) else prompt for prompt in prompts
        ]
    )
    kept = [truncated(request, one, service.engine.max_model_len, params.max_tokens) for one in token_ids]
    generation = Generation(
        answer_id(request, "cmpl-"),
        model,
        kept,
        _fitted(service, max_tokens, params, kept),
        request.priority or 0,
        cache_salt(request),
    )
    is_cut = (len(left) < len(one) for left, one in zip(kept, token_ids, strict=True))
    shown = [left if cut else prompt for left, cut, prompt in zip(kept, is_cut, prompts, strict=True)]
    job = CompletionJob(request, generation, shown)
    outputs = generate(service, generation)
    headers = {"x-request-id": generation.request_id}
    with named_as_asked(request):
        if request.stream:
            return await event_stream(http_request.receive, _events(service, job, outputs), headers)
        completion = await until_disconnect(http_request.receive, _whole(service, job, outputs))
        return json_response(completion, headers)


def _params(service: Service, request: CompletionRequest, max_tokens: int | None) -> SamplingParams:
    params = sampling_params(
        request,
        service.engine.default_params,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        logprobs=request.logprobs,
    )
    if request.best_of is not None and request.best_of != params.n:
        raise not_supported(f"best_of other than n ({params.n})", "best_of")
    if request.echo and request.logprobs is not None:
        raise not_supported("logprobs with echo", "logprobs")
    return params


def _fitted(
    service: Service, max_tokens: int | None, params: SamplingParams, prompts: Sequence[list[int]]
) -> list[SamplingParams]:
    """The parameters of each prompt: a max_tokens that nobody asked for takes what room there is."""
    if max_tokens is not None:
        return [params] * len(prompts)
    rooms = (service.engine.max_model_len - len(token_ids) for token_ids in prompts)
    return [replace(params, max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room))) for room in rooms]


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """One string, one list of token ids, or a list of either → a list of prompts.

    Raises:
        ApiError: 400, an empty list, or token ids beside prompts.
    """
    if isinstance(prompt, str):
        return [prompt]
    token_ids = [item for item in prompt if isinstance(item, int)]
    prompts = [item for item in prompt if not isinstance(item, int)]
    if not prompt or (token_ids and prompts):
        raise ApiError(
            400,
            "prompt must be a string, a list of token ids, or a list of one or more of these",
            param="prompt",
        )
    return prompts or [token_ids]


class ChoiceWriter:
    """Turns samples of one choice into its JSON form, whole or piece by piece."""

    def __init__(self, service: Service, job: CompletionJob, index: int) -> None:
        self._tokenizer = service.engine.tokenizer
        self._index = index
        self._return_token_ids = bool(job.request.return_token_ids)
        prompt = job.generation.prompts[index // job.params.n]
        # They come once.
        self._prompt_token_ids: list[int] | UnsetType = prompt if self._return_token_ids else UNSET
        # What is still to be put in front of the generated text.
        self._echo: Prompt = job.prompts[index // job.params.n] if job.request.echo else ""
        silent = self._tokenizer.special_token_ids if job.params.skip_special_tokens else frozenset()
        as_ids = job.request.return_tokens_as_token_ids is True
        self._logprobs = CompletionLogprobsFormatter(silent, as_ids)

    def write(self, sample: CompletionOutput) -> CompletionChoice:
        echo, self._echo = self._echo, ""
        prompt_token_ids, self._prompt_token_ids = self._prompt_token_ids, UNSET
        stop_reason = UNSET if sample.finish_reason is None else sample.stop_reason
        if not isinstance(echo, str):
            echo = self._tokenizer.decode(echo, skip_special_tokens=False)
        return CompletionChoice(
            index=self._index,
            text=echo + sample.text,
            logprobs=self._logprobs.format(sample),
            finish_reason=sample.finish_reason,
            stop_reason=stop_reason,
            matched_stop=stop_reason,
            prompt_token_ids=prompt_token_ids,
            token_ids=sample.token_ids if self._return_token_ids else UNSET,
        )


async def _whole(service: Service, job: CompletionJob, outputs: PromptOutputs) -> Completion:
    generation, counter = job.generation, TokenCounter(job.generation)
    samples = await collect(generation, outputs, counter)
    choices = [ChoiceWriter(service, job, sample.index).write(sample) for sample in samples]
    return Completion(
        generation.request_id,
        generation.created,
        generation.model,
        choices,
        service.fingerprint,
        usage=usage_of(counter),
        timings=timings_of(counter),
    )


async def _events(
    service: Service, job: CompletionJob, outputs: PromptOutputs
) -> AsyncGenerator[bytes, None]:
    generation, options = job.generation, job.request.stream_options
    counter = TokenCounter(generation)
    writers = [ChoiceWriter(service, job, index) for index in range(len(job.prompts) * job.params.n)]
    everything = job.params.logprobs is not None or job.request.return_token_ids

    head = (generation.request_id, generation.created, generation.model)
    num_open = len(writers)

    def chunk(choices: list[CompletionChoice], usage: Usage | UnsetType | None, is_last: bool) -> bytes:
        timings = timings_of(counter) if is_last else UNSET
        return event(Completion(*head, choices, service.fingerprint, usage=usage, timings=timings))

    async with aclosing(outputs):
        async for prompt_index, output in outputs:
            counter.add(prompt_index, output)
            for sample in output.outputs:
                # A token whose text is held back has nothing to show yet.
                if sample.text or sample.finish_reason or (everything and sample.token_ids):
                    writer = writers[prompt_index * job.params.n + sample.index]
                    num_open -= sample.finish_reason is not None
                    is_last = num_open == 0 and not has_usage_chunk(options)
                    yield chunk([writer.write(sample)], chunk_usage(counter, options), is_last)
    if has_usage_chunk(options):
        yield chunk([], usage_of(counter), True)
