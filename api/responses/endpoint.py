"""POST /v1/responses, and what can be asked of a response that is stored."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from api.body import json_response
from api.conversation import Conversation, effort_arguments, verbosity_arguments
from api.errors import ApiError, not_supported, to_api_error
from api.generation import Generation, TokenCounter, check_room, generate, new_id
from api.keys import client_of
from api.request_fields import read_cache_salt, read_timeout
from api.responses import bodies
from api.responses.events import ResponseWriter
from api.responses.items import Transcript, input_items, listed_item
from api.responses.protocol import (
    SAMPLING_FIELDS,
    ReasoningConfig,
    ResponseRequest,
    TextConfig,
    decode_response_request,
)
from api.responses.store import ResponseStore, StoredInput, StoredResponse
from api.responses.tools import Toolbox, read_choice
from api.service import Service
from api.streaming import StreamEnds, event, event_stream, whole_answer
from engine.core.limits import MAX_LOGPROBS
from engine.core.sampling_params import SamplingParams
from engine.core.structured_outputs import FIELD, StructuredOutputs
from engine.core.validation import CONTEXT_LENGTH_EXCEEDED
from engine.errors import EngineError, RequestError
from engine.frontend.chat_format import ChatFormat, ChatTurn

logger = logging.getLogger(__name__)

PATH = "/v1/responses"

MAX_PAGE = 100
DEFAULT_PAGE = 20

FIELDS = {"prompt": "input", "messages": "input", FIELD: "text.format", "response_format": "text.format"}
"""Names of fields here, by the engine's."""


@dataclass(frozen=True, slots=True)
class ResponseJob:
    """A checked request.

    Attributes:
        owner: Who may see the response; see `api.keys.Client`.
        answered: Its input, with stored items in place of references to them; None where it is not stored.
    """

    request: ResponseRequest
    owner: str
    answered: StoredInput | None
    generation: Generation
    turn: ChatTurn
    toolbox: Toolbox

    def writer(self) -> ResponseWriter:
        request = self.request
        return ResponseWriter(
            self._begun(),
            self.turn,
            self.toolbox.names,
            request.num_logprobs or 0,
            request.has_encrypted_reasoning,
        )

    def _begun(self) -> bodies.Response:
        request, generation = self.request, self.generation
        params = generation.params[0]
        text = request.text or TextConfig()
        reasoning = request.reasoning or ReasoningConfig()
        verbosity = {} if text.verbosity is None else {"verbosity": text.verbosity}
        return bodies.Response(
            id=generation.request_id,
            created_at=generation.created,
            model=generation.model,
            output=[],
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            max_tool_calls=request.max_tool_calls,
            metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls is not False,
            previous_response_id=request.previous_response_id,
            prompt_cache_key=request.prompt_cache_key,
            reasoning=bodies.ReasoningSettings(reasoning.effort),
            safety_identifier=request.safety_identifier,
            temperature=params.temperature,
            text={"format": text.format or {"type": "text"}, **verbosity},
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            top_logprobs=request.top_logprobs or 0,
            top_p=params.top_p,
            truncation=request.truncation or "disabled",
            user=request.user,
        )


@dataclass(slots=True)
class Reading:
    """What a request asks the model to answer, on the way from its items to a prompt.

    Attributes:
        history: The responses that it goes on from, the first at the front.
    """

    request: ResponseRequest
    history: list[StoredResponse]
    input_items: list[dict[str, Any]]
    unknown: list[str] = field(default_factory=list)

    def turn(self, chat_format: ChatFormat, max_prompt_tokens: int) -> tuple[ChatTurn, Toolbox]:
        """The prompt, and the tools in it.

        Raises:
            ApiError, RequestError: 400, an item, a tool or the form of the answer is not what it must be; or the
                prompt does not fit.
        """
        tool_format = chat_format.tool_format
        toolbox = Toolbox(keeps_grammars=tool_format is None or tool_format.has_texts)
        for index, tool in enumerate(self.request.tools or ()):
            toolbox.add(tool, f"tools[{index}]")
        transcript = Transcript(self.request.instructions, toolbox)
        for item in (item for stored in self.history for item in stored.read_items()):
            transcript.add(item, "previous_response_id")
        for index, item in enumerate(self.input_items):
            transcript.add(item, f"input[{index}]")
        toolbox.check()
        self.unknown += transcript.unknown + toolbox.unknown
        conversation = Conversation(
            transcript.finish(),
            toolbox.tools,
            read_choice(self.request.tool_choice, toolbox),
            self.request.parallel_tool_calls is not False,
            read_form(self.request.text),
            _template_arguments(self.request),
        )
        if self.request.truncation != "auto":
            return conversation.turn(chat_format), toolbox
        turn = _turn_within(conversation, chat_format, max_prompt_tokens)
        turn = turn or _truncated(conversation, chat_format, max_prompt_tokens)
        return turn or conversation.turn(chat_format), toolbox

    def answered(self) -> StoredInput:
        """The input as it is stored."""
        return StoredInput.of([listed_item(item) for item in self.input_items])


class ResponsesApi:
    """The endpoints, and the responses that they keep."""

    def __init__(self, service: Service, store: ResponseStore) -> None:
        self._service, self._store = service, store

    async def create(self, http_request: Request) -> Response:
        """Answers one request, whole or as events."""
        service = self._service
        service.check_ready()
        job = await self._read(http_request)
        headers = {"x-request-id": job.generation.request_id}
        with named_as_here():
            await service.engine.check(job.generation.prompts[0], job.generation.params[0])
        check_room(service, job.generation)
        writer, counter = job.writer(), TokenCounter(job.generation)
        if job.request.stream:
            events = self._events(job, writer, counter)
            return await event_stream(http_request.receive, events, headers, StreamEnds(done=b""))
        return await whole_answer(http_request.receive, self._whole(job, writer, counter), headers)

    async def _read(self, http_request: Request) -> ResponseJob:
        service, client = self._service, client_of(http_request)
        owner = client.owner
        limit = service.engine.max_model_len - 1
        async with service.bodies.receive(http_request) as body:
            request, unknown = await body.read(decode_response_request)
            model = service.check_model(request.model)
            params = _params(service, request)
            referred = self._referred(owner, request)
            items = await body.work(lambda: _resolved(input_items(request.input), referred))
            reading = Reading(request, self._history(owner, request), items, unknown)
            with named_as_here():
                turn, toolbox = await body.work(lambda: reading.turn(service.engine.chat_format, limit))
            answered = await body.work(reading.answered) if request.stores else None
            # It may be long, and is not kept as long as the request runs.
            request.input = None
        service.unknown_members.note(PATH, reading.unknown)
        length = len(turn.prompt_token_ids)
        if length > limit:
            raise ApiError(
                400,
                f"input: the prompt has {length} tokens; the context holds {limit + 1}, at least one of them for the "
                "output",
                param="input",
                code=CONTEXT_LENGTH_EXCEEDED,
            )
        room = limit + 1 - length
        params = replace(turn.params(params), max_tokens=min(request.max_output_tokens or room, room))
        generation = Generation(
            new_id("resp_"),
            client,
            model,
            [turn.prompt_token_ids],
            [params],
            body.arrival,
            client.priority(request.priority),
            read_cache_salt(request.cache_salt),
            read_timeout(request.timeout),
        )
        return ResponseJob(request, owner, answered, generation, turn, toolbox)

    def _history(self, owner: str, request: ResponseRequest) -> list[StoredResponse]:
        """The responses that the request goes on from."""
        previous = request.previous_response_id
        if previous is None:
            return []
        chain = self._store.chain(owner, previous)
        if chain is None:
            raise ApiError(
                400,
                f"Previous response with id '{previous}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return chain

    def _referred(self, owner: str, request: ResponseRequest) -> dict[str, StoredResponse]:
        """By the ids of items that the input refers to, the responses that have them."""
        referred = {}
        for index, item in enumerate(input_items(request.input)):
            if item.get("type") == "item_reference":
                item_id = str(item.get("id"))
                found = self._store.of_item(owner, item_id)
                if found is None:
                    raise ApiError(404, f"Item with id '{item_id}' not found.", param=f"input[{index}].id")
                referred[item_id] = found
        return referred

    async def _whole(
        self, job: ResponseJob, writer: ResponseWriter, counter: TokenCounter
    ) -> bodies.Response:
        async for _ in self._grow(job, writer, counter):
            pass
        return writer.response

    async def _events(
        self, job: ResponseJob, writer: ResponseWriter, counter: TokenCounter
    ) -> AsyncGenerator[bytes, None]:
        for one in writer.begin():
            yield _encoded(one)
        try:
            async with aclosing(self._grow(job, writer, counter)) as events:
                async for one in events:
                    yield _encoded(one)
        except Exception as error:
            if not isinstance(error, (ApiError, EngineError)):
                logger.exception("a stream failed")
            writer.fail(to_api_error(error), counter)
        yield _encoded(writer.end())

    async def _grow(
        self, job: ResponseJob, writer: ResponseWriter, counter: TokenCounter
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events of the output; the response is stored once it has ended."""
        async with aclosing(generate(self._service, job.generation)) as outputs:
            async for index, output in outputs:
                counter.add(index, output)
                for sample in output.outputs:
                    for one in writer.write(sample):
                        yield one
                    if sample.finish_reason is not None:
                        for one in writer.end_items(sample.finish_reason, counter):
                            yield one
        if job.answered is not None:
            self._store.put(job.owner, writer.response, job.answered)

    async def get(self, http_request: Request, response_id: str) -> Response:
        """The stored response."""
        if http_request.query_params.get("stream", "false") != "false":
            raise not_supported("stream of a response that is stored", "stream")
        stored = self._stored(http_request, response_id)
        return Response(stored.body, media_type="application/json")

    async def delete(self, http_request: Request, response_id: str) -> Response:
        self._stored(http_request, response_id)
        self._store.delete(client_of(http_request).owner, response_id)
        return json_response(bodies.DeletedResponse(response_id))

    async def list_input_items(self, http_request: Request, response_id: str) -> Response:
        """A page of what the response answers, the latest first."""
        stored = self._stored(http_request, response_id)
        return json_response(_page(stored.read_input(), http_request))

    def _stored(self, http_request: Request, response_id: str) -> StoredResponse:
        stored = self._store.get(client_of(http_request).owner, response_id)
        if stored is None:
            raise ApiError(404, f"Response with id '{response_id}' not found.")
        return stored


def _resolved(items: list[dict[str, Any]], referred: dict[str, StoredResponse]) -> list[dict[str, Any]]:
    """The items, with stored ones in place of references to them. Each response is read once, which may take long."""
    responses = {id(one): one for one in referred.values()}
    known = {item["id"]: item for one in responses.values() for item in one.read_items()}
    return [known[str(item.get("id"))] if item.get("type") == "item_reference" else item for item in items]


def _encoded(one: dict[str, Any]) -> bytes:
    return event(one, one["type"])


@contextmanager
def named_as_here() -> Iterator[None]:
    """Within it, errors of the engine name the fields of this endpoint."""
    try:
        yield
    except RequestError as error:
        name = FIELDS.get(error.field or "")
        if name is None:
            raise
        text = str(error).replace(error.field or "", name, 1)
        raise RequestError(text if name in text else f"{name}: {text}", name, error.code) from None


def _params(service: Service, request: ResponseRequest) -> SamplingParams:
    for name, low, high in (("max_output_tokens", 1, None), ("top_logprobs", 0, MAX_LOGPROBS)):
        value = getattr(request, name)
        if value is not None and (value < low or (high is not None and value > high)):
            limit = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ApiError(400, f"{name} must be {limit}, got {value}", param=name)
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
    return SamplingParams(**{**service.engine.default_params, **given, "logprobs": request.num_logprobs})


def _template_arguments(request: ResponseRequest) -> dict[str, Any]:
    arguments: dict[str, Any] = {"add_generation_prompt": True}
    if request.reasoning is not None and request.reasoning.effort is not None:
        arguments |= effort_arguments(request.reasoning.effort, "reasoning.effort")
    if request.text is not None and request.text.verbosity is not None:
        arguments |= verbosity_arguments(request.text.verbosity, "text.verbosity")
    return arguments


def read_form(text: TextConfig | None) -> StructuredOutputs | None:
    """The form that `text.format` asks for.

    Raises:
        ApiError: 400, it is none.
    """
    match None if text is None else text.format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return StructuredOutputs.read({"json_object": True})
        case {"type": "json_schema", "schema": dict(schema)}:
            return StructuredOutputs.read({"json": schema})
        case {"type": "json_schema"}:
            field, what = "text.format.schema", "a JSON Schema"
        case _:
            field, what = "text.format.type", "text, json_object or json_schema"
    raise ApiError(400, f"{field} must be {what}", param=field)


def _turn_within(
    conversation: Conversation, chat_format: ChatFormat, max_prompt_tokens: int
) -> ChatTurn | None:
    """The turn, unless its prompt is longer."""
    try:
        turn = conversation.turn(chat_format)
    except RequestError as error:
        if error.code == CONTEXT_LENGTH_EXCEEDED:
            return None
        raise
    return turn if len(turn.prompt_token_ids) <= max_prompt_tokens else None


def _truncated(
    conversation: Conversation, chat_format: ChatFormat, max_prompt_tokens: int
) -> ChatTurn | None:
    """The turn without the fewest messages at the beginning that makes it fit; None where nothing does.

    System messages stay, and what goes ends before a user's message, so that no result stands without its call.
    """
    messages = conversation.messages
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"][1:]

    def without(number: int) -> ChatTurn | None:
        start = starts[number]
        kept = [message for message in messages[:start] if message["role"] == "system"]
        shorter = replace(conversation, messages=[*kept, *messages[start:]])
        return _turn_within(shorter, chat_format, max_prompt_tokens)

    low, high, best = 0, len(starts), None
    while low < high:
        middle = (low + high) // 2
        turn = without(middle)
        if turn is not None:
            high, best = middle, turn
        else:
            low = middle + 1
    return best


def _page(items: list[dict[str, Any]], http_request: Request) -> Struct:
    """A page of items, as the query asks for it.

    Raises:
        ApiError: 400, it asks for none that there is.
    """
    query = http_request.query_params
    order, after = query.get("order", "desc"), query.get("after")
    limit = query.get("limit", str(DEFAULT_PAGE))
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order must be asc or desc, got {order!r}", param="order")
    if not limit.isdecimal() or len(limit) > len(str(MAX_PAGE)) or not 1 <= int(limit) <= MAX_PAGE:
        raise ApiError(400, f"limit must be between 1 and {MAX_PAGE}, got {limit!r}", param="limit")
    ordered = items if order == "asc" else items[::-1]
    if after is not None:
        place = next((index for index, item in enumerate(ordered) if item["id"] == after), None)
        if place is None:
            raise ApiError(400, f"after: there is no item {after!r}", param="after")
        ordered = ordered[place + 1 :]
    page = ordered[: int(limit)]
    return bodies.InputItemList(
        data=page,
        first_id=page[0]["id"] if page else "",
        last_id=page[-1]["id"] if page else "",
        has_more=len(ordered) > len(page),
    )
