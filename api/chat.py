"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request, Response
from msgspec import UNSET

from api.answer import AnswerWriter
from api.bodies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
)
from api.body import json_response, read_body
from api.errors import ApiError
from api.generation import PromptOutputs, UsageCounter, collect, generate
from api.logprobs import chat_logprobs
from api.messages import begin_turn
from api.protocol import ChatCompletionRequest, decode_request
from api.sampling import sampling_params
from api.service import Service
from api.streaming import event, event_stream, until_disconnect
from api.structured_outputs import named_as_asked
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import MAX_LOGPROBS, SamplingParams
from engine.errors import RequestError
from engine.frontend.chat_format import ChatTurn


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A checked request."""

    request_id: str
    created: int
    model: str
    request: ChatCompletionRequest
    params: SamplingParams
    turn: ChatTurn

    def writer(self) -> AnswerWriter:
        """For one sample."""
        return AnswerWriter(
            self.turn, bool(self.request.functions), self.request.include_reasoning is not False
        )


async def create_chat_completion(service: Service, http_request: Request) -> Response:
    """Answers one request, whole or as events."""
    service.check_ready()
    request = decode_request(await read_body(http_request), ChatCompletionRequest)
    model = service.check_model(request.model)
    params = _params(service, request)
    with named_as_asked(request):
        # In a thread: a long chat takes long enough to be felt by the streams of others.
        turn = await asyncio.to_thread(
            begin_turn, service.engine.chat_format, request, params.structured_outputs
        )
    params = turn.params(params)
    job = ChatJob(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model, request, params, turn)
    outputs = generate(service, [turn.prompt_token_ids], [params], job.request_id, request.priority)
    headers = {"x-request-id": job.request_id}
    try:
        with named_as_asked(request):
            if request.stream:
                return await event_stream(http_request.receive, _events(job, outputs), headers)
            return json_response(await until_disconnect(http_request.receive, _whole(job, outputs)), headers)
    except RequestError as error:
        if error.field == "max_tokens" and request.max_completion_tokens is not None:
            raise RequestError(
                f"max_completion_tokens: {error}", "max_completion_tokens", error.code
            ) from None
        if error.field != "prompt":
            raise
        raise RequestError(f"messages: {error}", "messages", error.code) from None


def _params(service: Service, request: ChatCompletionRequest) -> SamplingParams:
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        max_tokens = request.max_completion_tokens
        if max_tokens < 1:
            raise ApiError(
                400,
                f"max_completion_tokens must be at least 1, got {max_tokens}",
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
    counter = UsageCounter([job.turn.prompt_token_ids])
    samples = await collect(outputs, 1, job.params.n, counter)
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
    return ChatCompletion(job.request_id, job.created, job.model, choices, counter.usage())


async def _events(job: ChatJob, outputs: PromptOutputs) -> AsyncGenerator[bytes, None]:
    """A role chunk for every sample, contents, finish chunks, and the usage if asked for."""
    counter = UsageCounter([job.turn.prompt_token_ids], job.request.stream_options)
    writers = [job.writer() for _ in range(job.params.n)]
    everything = job.params.logprobs is not None or job.request.return_token_ids

    def chunk(choice: ChatChunkChoice) -> bytes:
        usage = counter.chunk_usage()
        return event(ChatChunk(job.request_id, job.created, job.model, [choice], usage=usage))

    has_begun = False
    async with aclosing(outputs):
        async for _, output in outputs:
            counter.add(0, output)
            if output.outputs and not has_begun:
                has_begun = True
                for index in range(job.params.n):
                    yield chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
            for sample in output.outputs:
                writer = writers[sample.index]
                delta = writer.write(sample.text, is_last=sample.finish_reason is not None)
                # A token whose text is held back has nothing to show yet.
                if not delta.is_empty or (everything and sample.token_ids):
                    yield chunk(_delta_choice(job, sample, delta))
                if sample.finish_reason is not None:
                    yield chunk(_finish_choice(sample, writer))
    if counter.has_usage_chunk:
        yield event(ChatChunk(job.request_id, job.created, job.model, [], usage=counter.usage()))


def _delta_choice(job: ChatJob, sample: CompletionOutput, delta: ChatDelta) -> ChatChunkChoice:
    if delta.is_empty:
        delta.content = ""
    return ChatChunkChoice(
        index=sample.index,
        delta=delta,
        logprobs=chat_logprobs(sample, job.params.logprobs or 0),
        token_ids=sample.token_ids if job.request.return_token_ids else UNSET,
    )


def _finish_choice(sample: CompletionOutput, writer: AnswerWriter) -> ChatChunkChoice:
    return ChatChunkChoice(
        index=sample.index,
        delta=ChatDelta(),
        finish_reason=writer.finish_reason(sample.finish_reason),
        stop_reason=sample.stop_reason,
    )
