"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from api.bodies import Completion, CompletionChoice, Usage
from api.body import json_response, read_body
from api.errors import ApiError, not_supported
from api.generation import Generation, PromptOutputs, TokenCounter, collect, generate, new_id
from api.logprobs import CompletionLogprobsFormatter
from api.prompts import Prompt, encode_prompts, split_prompts
from api.protocol import CompletionRequest, decode_request
from api.sampling import sampling_params
from api.service import Service
from api.streaming import event, event_stream, until_disconnect
from api.structured_outputs import named_as_asked
from api.usage import chunk_usage, has_usage_chunk, usage_of
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 2048


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """A checked request.

    Attributes:
        prompts: As given, for echo.
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
    params = _params(service, request)
    prompts = split_prompts(request.prompt, "prompt")
    if len(prompts) * params.n > MAX_CHOICES:
        raise ApiError(
            400,
            f"prompt and n ask for {len(prompts)} x {params.n} choices; at most {MAX_CHOICES} are given",
            param="prompt",
        )
    token_ids = await encode_prompts(service, prompts)
    generation = Generation(
        new_id("cmpl-"), model, token_ids, _fitted(service, request, params, token_ids), request.priority or 0
    )
    job = CompletionJob(request, generation, prompts)
    outputs = generate(service, generation)
    headers = {"x-request-id": generation.request_id}
    with named_as_asked(request):
        if request.stream:
            return await event_stream(http_request.receive, _events(service, job, outputs), headers)
        completion = await until_disconnect(http_request.receive, _whole(service, job, outputs))
        return json_response(completion, headers)


def _params(service: Service, request: CompletionRequest) -> SamplingParams:
    params = sampling_params(
        request,
        service.engine.default_params,
        max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        logprobs=request.logprobs,
    )
    if request.best_of is not None and request.best_of != params.n:
        raise not_supported(f"best_of other than n ({params.n})", "best_of")
    if request.echo and request.logprobs is not None:
        raise not_supported("logprobs with echo", "logprobs")
    return params


def _fitted(
    service: Service, request: CompletionRequest, params: SamplingParams, prompts: Sequence[list[int]]
) -> list[SamplingParams]:
    """The parameters of each prompt: a max_tokens that nobody asked for takes what room there is."""
    if request.max_tokens is not None:
        return [params] * len(prompts)
    rooms = (service.engine.max_model_len - len(token_ids) for token_ids in prompts)
    return [replace(params, max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room))) for room in rooms]


class ChoiceWriter:
    """Turns samples of one choice into its JSON form, whole or piece by piece."""

    def __init__(self, service: Service, job: CompletionJob, index: int) -> None:
        self._tokenizer = service.engine.tokenizer
        self._index = index
        self._return_token_ids = bool(job.request.return_token_ids)
        # What is still to be put in front of the generated text.
        self._echo: Prompt = job.prompts[index // job.params.n] if job.request.echo else ""
        silent = self._tokenizer.special_token_ids if job.params.skip_special_tokens else frozenset()
        self._logprobs = CompletionLogprobsFormatter(silent)

    def write(self, sample: CompletionOutput) -> CompletionChoice:
        echo, self._echo = self._echo, ""
        if not isinstance(echo, str):
            echo = self._tokenizer.decode(echo, skip_special_tokens=False)
        return CompletionChoice(
            index=self._index,
            text=echo + sample.text,
            logprobs=self._logprobs.format(sample),
            finish_reason=sample.finish_reason,
            stop_reason=UNSET if sample.finish_reason is None else sample.stop_reason,
            token_ids=sample.token_ids if self._return_token_ids else UNSET,
        )


async def _whole(service: Service, job: CompletionJob, outputs: PromptOutputs) -> Completion:
    generation, counter = job.generation, TokenCounter(job.generation)
    samples = await collect(generation, outputs, counter)
    choices = [ChoiceWriter(service, job, sample.index).write(sample) for sample in samples]
    return Completion(
        generation.request_id, generation.created, generation.model, choices, usage=usage_of(counter)
    )


async def _events(
    service: Service, job: CompletionJob, outputs: PromptOutputs
) -> AsyncGenerator[bytes, None]:
    generation, options = job.generation, job.request.stream_options
    counter = TokenCounter(generation)
    writers = [ChoiceWriter(service, job, index) for index in range(len(job.prompts) * job.params.n)]
    everything = job.params.logprobs is not None or job.request.return_token_ids

    def chunk(choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> bytes:
        return event(
            Completion(generation.request_id, generation.created, generation.model, choices, usage=usage)
        )

    async with aclosing(outputs):
        async for prompt_index, output in outputs:
            counter.add(prompt_index, output)
            for sample in output.outputs:
                # A token whose text is held back has nothing to show yet.
                if sample.text or sample.finish_reason or (everything and sample.token_ids):
                    writer = writers[prompt_index * job.params.n + sample.index]
                    yield chunk([writer.write(sample)], chunk_usage(counter, options))
    if has_usage_chunk(options):
        yield chunk([], usage_of(counter))
