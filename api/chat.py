"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from api import bodies
from api.bodies import ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, Usage
from api.body import json_response, read_body
from api.chat_answer import ChatAnswerWriter
from api.chat_messages import named_as_in_chat, read_conversation
from api.conversation import begin_turn
from api.errors import ApiError
from api.generation import (
    Generation,
    PromptLogprobs,
    PromptOutputs,
    TokenCounter,
    collect,
    generate,
    new_id,
    note_prompt_logprobs,
)
from api.logprobs import chat_logprobs, prompt_logprobs_of
from api.protocol import ChatCompletionRequest, decode_request
from api.sampling import sampling_params
from api.service import Service
from api.streaming import event, event_stream, until_disconnect
from api.usage import chunk_usage, has_usage_chunk, usage_of
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import MAX_LOGPROBS, SamplingParams
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

    def shown_prompt_logprobs(self) -> bodies.PromptLogprobs | UnsetType:
        """The prompt's log-probabilities, if they are asked for."""
        num_top = self.request.prompt_logprobs
        return UNSET if num_top is None else prompt_logprobs_of(self.prompt_logprobs[0], num_top)

    def writer(self) -> ChatAnswerWriter:
        """For one sample."""
        return ChatAnswerWriter(
            self.turn, bool(self.request.functions), self.request.include_reasoning is not False
        )


async def create_chat_completion(service: Service, http_request: Request) -> Response:
    """Answers one request, whole or as events."""
    service.check_ready()
    request = decode_request(await read_body(http_request), ChatCompletionRequest)
    model = service.check_model(request.model)
    params = _params(service, request)
    with named_as_in_chat(request):
        turn = await begin_turn(service, read_conversation(request, params.structured_outputs))
        generation = Generation(
            new_id("chatcmpl-"), model, [turn.prompt_token_ids], [turn.params(params)], request.priority or 0
        )
        job = ChatJob(request, generation, turn)
        outputs = generate(service, generation)
        if params.prompt_logprobs is not None:
            outputs = note_prompt_logprobs(outputs, job.prompt_logprobs)
        headers = {"x-request-id": generation.request_id}
        if request.stream:
            return await event_stream(http_request.receive, _events(job, outputs), headers)
        return json_response(await until_disconnect(http_request.receive, _whole(job, outputs)), headers)


def _params(service: Service, request: ChatCompletionRequest) -> SamplingParams:
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        max_tokens = request.max_completion_tokens
        least = 1 if request.prompt_logprobs is None else 0
        if max_tokens < least:
            raise ApiError(
                400,
                f"max_completion_tokens must be at least {least}, got {max_tokens}",
                param="max_completion_tokens",
            )
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


async def _whole(job: ChatJob, outputs: PromptOutputs) -> ChatCompletion:
    counter = TokenCounter(job.generation)
    samples = await collect(job.generation, outputs, counter)
    choices = []
    for sample in samples:
        writer = job.writer()
        choices.append(
            ChatChoice(
                index=sample.index,
                message=writer.message(sample.text),
                logprobs=chat_logprobs(sample, job.params.logprobs or 0),
                finish_reason=writer.finish_reason(sample.finish_reason),
                stop_reason=sample.stop_reason,
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
        prompt_logprobs=job.shown_prompt_logprobs(),
    )


async def _events(job: ChatJob, outputs: PromptOutputs) -> AsyncGenerator[bytes, None]:
    """A role chunk for every sample, contents, finish chunks, and the usage if asked for."""
    generation, options = job.generation, job.request.stream_options
    counter = TokenCounter(generation)
    writers = [job.writer() for _ in range(job.params.n)]
    everything = job.params.logprobs is not None or job.request.return_token_ids

    def chunk(
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        prompt_logprobs: bodies.PromptLogprobs | UnsetType = UNSET,
    ) -> bytes:
        return event(
            ChatChunk(
                generation.request_id,
                generation.created,
                generation.model,
                choices,
                usage=usage,
                prompt_logprobs=prompt_logprobs,
            )
        )

    has_begun = False
    async with aclosing(outputs):
        async for _, output in outputs:
            counter.add(0, output)
            if output.outputs and not has_begun:
                has_begun = True
                for index in range(job.params.n):
                    delta = ChatDelta(role="assistant", content="")
                    shown = job.shown_prompt_logprobs() if index == 0 else UNSET
                    yield chunk([ChatChunkChoice(index, delta)], chunk_usage(counter, options), shown)
            for sample in output.outputs:
                writer = writers[sample.index]
                delta = writer.write(sample.text, is_last=sample.finish_reason is not None)
                # A token whose text is held back has nothing to show yet.
                if not delta.is_empty or (everything and sample.token_ids):
                    yield chunk([_delta_choice(job, sample, delta)], chunk_usage(counter, options))
                if sample.finish_reason is not None:
                    yield chunk([_finish_choice(sample, writer)], chunk_usage(counter, options))
    if has_usage_chunk(options):
        yield chunk([], usage_of(counter))


def _delta_choice(job: ChatJob, sample: CompletionOutput, delta: ChatDelta) -> ChatChunkChoice:
    if delta.is_empty:
        delta.content = ""
    return ChatChunkChoice(
        index=sample.index,
        delta=delta,
        logprobs=chat_logprobs(sample, job.params.logprobs or 0),
        token_ids=sample.token_ids if job.request.return_token_ids else UNSET,
    )


def _finish_choice(sample: CompletionOutput, writer: ChatAnswerWriter) -> ChatChunkChoice:
    return ChatChunkChoice(
        index=sample.index,
        delta=ChatDelta(),
        finish_reason=writer.finish_reason(sample.finish_reason),
        stop_reason=sample.stop_reason,
    )
