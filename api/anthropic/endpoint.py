"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from api.anthropic.conversation import REFUSED, form_field, read_conversation
from api.anthropic.events import (
    ENDS,
    AnswerBlock,
    AnswerMessage,
    BlockWriter,
    Ending,
    MessageEnd,
    MessageStart,
    MessageStop,
    Ping,
    StopReason,
    Usage,
    encode,
    usage_of,
)
from api.anthropic.protocol import CountRequest, MessageRequest
from api.anthropic.tools import is_served
from api.body import Body, json_response
from api.errors import ApiError
from api.generation import Generation, TokenCounter, check_room, collect, generate, new_id
from api.keys import client_of
from api.protocol import decode_body, without_ignored
from api.request_fields import read_cache_salt, read_timeout
from api.service import Service
from api.streaming import event_stream, whole_answer, with_beats
from api.unknown_members import find_unknown
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SamplingParams
from engine.core.structured_outputs import FIELD
from engine.core.validation import CONTEXT_LENGTH_EXCEEDED
from engine.errors import RequestError
from engine.frontend.chat_format import ChatTurn

PING_SECONDS = 5.0
"""Time between pings: while a prompt is computed there is nothing else to send, and clients hang up on silence."""

Asked = TypeVar("Asked", bound=CountRequest)


class TokenCount(Struct):
    input_tokens: int


@dataclass(frozen=True, slots=True)
class MessageJob:
    """A checked request.

    Attributes:
        is_clipped: Whether the context holds less than the request allows.
    """

    request: MessageRequest
    generation: Generation
    turn: ChatTurn
    is_clipped: bool

    def writer(self) -> BlockWriter:
        thinking = self.request.thinking
        return BlockWriter(self.turn, shows_thoughts=thinking is None or thinking.display != "omitted")

    @property
    def answers(self) -> bool:
        """Whether there is an answer; else the prompt is computed for the cache alone."""
        return self.request.max_tokens > 0

    def ending(self, sample: CompletionOutput, has_calls: bool) -> Ending:
        """Why the answer ended."""
        if isinstance(sample.stop_reason, str):
            return Ending("stop_sequence", sample.stop_reason)
        reason: StopReason = "tool_use" if has_calls else "end_turn"
        if sample.finish_reason == "length":
            reason = "model_context_window_exceeded" if self.is_clipped else "max_tokens"
        return Ending(reason, None)

    def message(self, content: list[AnswerBlock], ending: Ending | None, usage: Usage) -> AnswerMessage:
        """The answer; without an ending it has just begun."""
        generation = self.generation
        reason, sequence = (ending.stop_reason, ending.stop_sequence) if ending is not None else (None, None)
        return AnswerMessage(generation.request_id, generation.model, content, reason, sequence, usage)


async def create_message(service: Service, http_request: Request) -> Response:
    """Answers one request, whole or as events."""
    service.check_ready()
    async with service.bodies.receive(http_request) as body:
        request = await _read(service, body, http_request.url.path, MessageRequest)
        with named_as_here(request):
            model = service.check_model(request.model)
            params = _params(service, request)
            turn = await body.work(lambda: read_conversation(request).turn(service.engine.chat_format))
    with named_as_here(request):
        room = service.engine.max_model_len - len(turn.prompt_token_ids)
        if room < 1:
            length, limit = len(turn.prompt_token_ids), service.engine.max_model_len - 1
            # In these words, on which Claude Code shortens the conversation and tries again.
            raise ApiError(400, f"prompt is too long: {length} tokens > {limit} maximum", param="messages")
        params = replace(turn.params(params), max_tokens=min(params.max_tokens or 1, room))
        salt = read_cache_salt(request.cache_salt)
        client = client_of(http_request)
        generation = Generation(
            new_id("msg_"),
            client,
            model,
            [turn.prompt_token_ids],
            [params],
            body.arrival,
            client.priority(None),
            salt,
            read_timeout(request.timeout),
        )
        # What the prompt was made of may be long, and is not kept as long as the request runs.
        request.messages, request.tools, request.system = [], None, None
        job = MessageJob(request, generation, turn, is_clipped=request.max_tokens > room)
        headers = {"x-request-id": generation.request_id}
        if request.stream:
            return await event_stream(http_request.receive, _events(service, job), headers, ENDS)
        return await whole_answer(http_request.receive, _whole(service, job), headers)


async def count_tokens(service: Service, http_request: Request) -> Response:
    """Answers with the number of tokens of the prompt."""
    service.check_ready()
    async with service.bodies.receive(http_request) as body:
        request = await _read(service, body, http_request.url.path, CountRequest)
        with named_as_here(request):
            service.check_model(request.model)
            turn = await body.work(lambda: read_conversation(request).turn(service.engine.chat_format))
    return json_response(TokenCount(len(turn.prompt_token_ids)))


async def _read(service: Service, body: Body, path: str, kind: type[Asked]) -> Asked:
    """The request; what it holds that nothing reads is counted."""
    request, unknown = await body.read(lambda data: _decode(data, kind))
    service.unknown_members.note(path, [*unknown, *_not_offered(request)])
    return request


def _decode(data: bytearray, kind: type[Asked]) -> tuple[Asked, list[str]]:
    kept = without_ignored(data, kind, (*REFUSED, "thread"))
    return decode_body(kept, kind), list(find_unknown(decode_body(kept, dict[str, Any]), kind))


def _not_offered(request: CountRequest) -> Iterator[str]:
    """Tools that Anthropic's own servers would run: clients that have them ask for them always."""
    for tool in request.tools or ():
        if not is_served(tool):
            yield f"tools[].type {tool.type}"


def _params(service: Service, request: MessageRequest) -> SamplingParams:
    given = {
        name: value
        for name in ("temperature", "top_k", "top_p")
        if (value := getattr(request, name)) is not None
    }
    # One token is drawn, and not shown, where there is to be none.
    given |= {"max_tokens": request.max_tokens or 1, "stop": request.stop_sequences or ()}
    return SamplingParams(**{**service.engine.default_params, **given})


@contextmanager
def named_as_here(request: CountRequest) -> Iterator[None]:
    """Within it, errors of the engine name the fields of this endpoint."""
    try:
        yield
    except RequestError as error:
        form = form_field(request)
        names = {"prompt": "messages", "stop": "stop_sequences", FIELD: form, "response_format": form}
        field = error.field or ""
        if field not in names:
            raise
        if field == "prompt" and error.code == CONTEXT_LENGTH_EXCEEDED:
            # In its own words, on which Claude Code shortens the conversation and tries again.
            raise RequestError(str(error), names[field], error.code) from None
        text = str(error) if field in str(error) else f"{field}: {error}"
        raise RequestError(text.replace(field, names[field], 1), names[field], error.code) from None


async def _whole(service: Service, job: MessageJob) -> AnswerMessage:
    counter = TokenCounter(job.generation)
    (sample,) = await collect(job.generation, generate(service, job.generation), counter)
    if not job.answers:
        counter.num_completion_tokens = 0
        return job.message([], Ending("max_tokens", None), usage_of(counter))
    writer = job.writer()
    content = writer.blocks(sample.text)
    return job.message(content, job.ending(sample, writer.has_calls), usage_of(counter))


async def _events(service: Service, job: MessageJob) -> AsyncGenerator[bytes, None]:
    """The message's beginning once the engine takes the request, blocks, and the message's end; pings meanwhile."""
    generation = job.generation
    await service.engine.check(generation.prompts[0], generation.params[0])
    check_room(service, generation)
    counter, writer = TokenCounter(generation), job.writer()
    # What the cache has is known with the first token: until then, nothing.
    yield encode(MessageStart(job.message([], None, usage_of(counter))))
    yield encode(Ping())
    ending = Ending("max_tokens", None)
    async with aclosing(with_beats(generate(service, generation), PING_SECONDS)) as outputs:
        async for numbered in outputs:
            if numbered is None:
                yield encode(Ping())
                continue
            counter.add(*numbered)
            for sample in numbered[1].outputs if job.answers else ():
                for one in writer.write(sample.text, is_last=sample.finish_reason is not None):
                    yield encode(one)
                if sample.finish_reason is not None:
                    ending = job.ending(sample, writer.has_calls)
    if not job.answers:
        counter.num_completion_tokens = 0
    yield encode(MessageEnd(ending, usage_of(counter)))
    yield encode(MessageStop())
