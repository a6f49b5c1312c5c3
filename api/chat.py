"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from api.bodies import ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatLogprobs, Usage
from api.body import off_loop
from api.chat_answer import ChatAnswerWriter
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
from api.logprobs import chat_logprobs, prompt_logprobs_of
from api.openai_messages import named_as_in_chat, read_conversation
from api.protocol import ChatCompletionRequest, decode_request
from api.request_fields import answer_id, read_cache_salt, read_timeout, truncated
from api.sampling import requested_max_tokens, sampling_params
from api.service import Service
from api.streaming import TextEvents, event, event_stream, whole_answer
from api.usage import chunk_usage, has_usage_chunk, timings_of, usage_of
from engine.core.limits import MAX_LOGPROBS
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams
from engine.frontend.chat_format import ChatTurn


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A checked request.

    Attributes:
        prompt_logprobs: By the index of the one prompt, once they are there.
    """

    request: ChatCompletionRequest
    generation: Generation
    turn: ChatTurn
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)

    @property
    def params(self) -> SamplingParams:
        return self.generation.params[0]

    def of_prompt(self) -> dict[str, Any]:
        """The fields of the answer that tell of the prompt, those that are asked for."""
        fields: dict[str, Any] = {}
        if self.request.return_token_ids:
            fields["prompt_token_ids"] = self.generation.prompts[0]
        if self.request.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs_of(
                self.prompt_logprobs[0], self.request.prompt_logprobs
            )
        return fields

    def writer(self) -> ChatAnswerWriter:
        """For one sample."""
        return ChatAnswerWriter(
            self.turn, bool(self.request.functions), self.request.include_reasoning is not False
        )


async def create_chat_completion(service: Service, http_request: Request) -> Response:
    """Answers one request, whole or as events."""
    service.check_ready()
    async with service.bodies.receive(http_request) as body:
        job = await body.read(lambda data: _read_job(service, client_of(http_request), body.arrival, data))
    outputs = generate(service, job.generation)
    if job.params.prompt_logprobs is not None:
        outputs = note_prompt_logprobs(outputs, job.prompt_logprobs)
    headers = {"x-request-id": job.generation.request_id}
    with named_as_in_chat(job.request):
        if job.request.stream:
            return await event_stream(http_request.receive, _events(service, job, outputs), headers)
        return await whole_answer(http_request.receive, _whole(service, job, outputs), headers)


def _read_job(service: Service, client: Client, arrival: float, body: bytearray) -> ChatJob:
    request = decode_request(body, ChatCompletionRequest)
    model = service.check_model(request.model)
    params = _params(service, request)
    with named_as_in_chat(request):
        turn = read_conversation(request, params.structured_outputs).turn(service.engine.chat_format)
        generation = Generation(
            answer_id(request, "chatcmpl-"),
            client,
            model,
            [truncated(request, turn.prompt_token_ids, service.engine.max_model_len, params.max_tokens)],
            [turn.params(params)],
            arrival,
            client.priority(request.priority),
            read_cache_salt(request.cache_salt),
            timeout=read_timeout(request.timeout),
        )
    # What the prompt was made of may be long, and is not kept as long as the request runs.
    request.messages, request.tools, request.documents, request.chat_template_kwargs = [], None, None, None
    return ChatJob(request, generation, turn)


def _params(service: Service, request: ChatCompletionRequest) -> SamplingParams:
    max_tokens = requested_max_tokens(request, least=1 if request.prompt_logprobs is None else 0)
    num_logprobs = request.top_logprobs
    if num_logprobs is not None:
        if not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if not 0 <= num_logprobs <= MAX_LOGPROBS:
            raise ApiError(
                400,
                f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {num_logprobs}",
                param="top_logprobs",
            )
    return sampling_params(
        request,
        service.engine.default_params,
        max_tokens=max_tokens,
        logprobs=(num_logprobs or 0) if request.logprobs else None,
    )


async def _whole(service: Service, job: ChatJob, outputs: PromptOutputs) -> ChatCompletion:
    counter = TokenCounter(job.generation)
    samples = await collect(job.generation, outputs, counter)
    choices = []
    for sample in samples:
        writer = job.writer()
        choices.append(
            ChatChoice(
                index=sample.index,
                message=writer.message(sample.text),
                logprobs=_logprobs(job, sample),
                finish_reason=writer.finish_reason(sample.finish_reason),
                stop_reason=sample.stop_reason,
                matched_stop=sample.stop_reason,
                token_ids=sample.token_ids if job.request.return_token_ids else UNSET,
            )
        )
    generation = job.generation
    return ChatCompletion(
        generation.request_id,
        generation.created,
        generation.model,
        choices,
        usage_of(counter),
        timings_of(counter),
        service.fingerprint,
        **await off_loop(bool(job.prompt_logprobs), job.of_prompt),
    )


def _logprobs(job: ChatJob, sample: CompletionOutput) -> ChatLogprobs | None:
    return chat_logprobs(sample, job.params.logprobs or 0, job.request.return_tokens_as_token_ids is True)


async def _events(service: Service, job: ChatJob, outputs: PromptOutputs) -> AsyncGenerator[bytes, None]:
    """A role chunk for every sample, contents, finish chunks, and the usage if asked for."""
    generation, options = job.generation, job.request.stream_options
    counter = TokenCounter(generation)
    writers = [job.writer() for _ in range(job.params.n)]
    everything = job.params.logprobs is not None or job.request.return_token_ids
    head = (generation.request_id, generation.created, generation.model)
    fingerprint = service.fingerprint

    def chunk(
        choices: list[ChatChunkChoice], usage: Usage | UnsetType | None, is_last: bool = False, **others: Any
    ) -> bytes:
        timings = timings_of(counter) if is_last else UNSET
        return event(ChatChunk(*head, choices, fingerprint, usage=usage, timings=timings, **others))

    # What most events are.
    contents: list[TextEvents] = []
    if not everything and not (options and options.continuous_usage_stats):
        usage = chunk_usage(counter, options)
        for index in range(job.params.n):
            example = chunk([ChatChunkChoice(index, ChatDelta(content=""))], usage)
            contents.append(TextEvents(example, "content"))

    has_begun, num_open = False, job.params.n
    async with aclosing(outputs):
        async for _, output in outputs:
            if output.outputs and not has_begun:
                has_begun = True
                counter.add_prompt(0, output)
                of_prompt = await off_loop(bool(job.prompt_logprobs), job.of_prompt)
                for index in range(job.params.n):
                    delta = ChatDelta(role="assistant", content="")
                    others = of_prompt if index == 0 else {}
                    yield chunk([ChatChunkChoice(index, delta)], chunk_usage(counter, options), **others)
            counter.add(0, output)
            for sample in output.outputs:
                writer = writers[sample.index]
                delta = writer.write(sample.text, is_last=sample.finish_reason is not None)
                # A token whose text is held back has nothing to show yet.
                if contents and delta.is_content:
                    yield contents[sample.index].event(str(delta.content))
                elif not delta.is_empty or (everything and sample.token_ids):
                    yield chunk([_delta_choice(job, sample, delta)], chunk_usage(counter, options))
                if sample.finish_reason is not None:
                    num_open -= 1
                    is_last = num_open == 0 and not has_usage_chunk(options)
                    yield chunk([_finish_choice(sample, writer)], chunk_usage(counter, options), is_last)
    if has_usage_chunk(options):
        yield chunk([], usage_of(counter), is_last=True)


def _delta_choice(job: ChatJob, sample: CompletionOutput, delta: ChatDelta) -> ChatChunkChoice:
    if delta.is_empty:
        delta.content = ""
    return ChatChunkChoice(
        index=sample.index,
        delta=delta,
        logprobs=_logprobs(job, sample),
        token_ids=sample.token_ids if job.request.return_token_ids else UNSET,
    )


def _finish_choice(sample: CompletionOutput, writer: ChatAnswerWriter) -> ChatChunkChoice:
    return ChatChunkChoice(
        index=sample.index,
        delta=ChatDelta(),
        finish_reason=writer.finish_reason(sample.finish_reason),
        stop_reason=sample.stop_reason,
        matched_stop=sample.stop_reason,
    )
