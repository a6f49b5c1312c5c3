"""The web application: which path does what, and who may ask."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from api.admission import Admission
from api.anthropic.conversation import REFUSED
from api.anthropic.endpoint import count_tokens, create_message
from api.anthropic.models import anthropic_model, anthropic_models, is_anthropics
from api.anthropic.protocol import CountRequest, MessageRequest
from api.bodies import (
    ChatChunk,
    ChatCompletion,
    Completion,
    EmbeddingList,
    Model,
    ModelList,
    Prompt,
    Status,
    Tokens,
    Version,
)
from api.body import json_response
from api.chat import create_chat_completion
from api.completions import create_completion
from api.embeddings import create_embeddings
from api.errors import ApiError, add_error_handlers
from api.http import HeadMiddleware, RequestIdMiddleware
from api.keys import ApiKey, KeyMiddleware, KeyRing
from api.metrics import Metrics
from api.openapi import ANSWER_ERRORS, BODY_ERRORS, Operation, openapi
from api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Message,
    TokenizeChatRequest,
    TokenizeRequest,
)
from api.responses.codex_models import codex_model
from api.responses.endpoint import ResponsesApi
from api.responses.protocol import ResponseRequest
from api.responses.store import STORE_BYTES, STORE_SECONDS, ResponseStore
from api.routing import endpoint
from api.service import VERSION, Service
from api.tokenization import apply_template, detokenize, tokenize
from api.trace import create_trace

if TYPE_CHECKING:
    from engine.frontend.async_engine import ServedEngine

OPEN_PATHS = ("/health", "/ready", "/ping", "/openapi.json", "/docs")
"""What needs no key; all that is not named does."""

METRICS_PATHS = ("/metrics", "/version")
"""What needs none under --open-metrics."""

ANY_NAME = "*"
"""Among the served names: requests may give any."""

DOCS_PAGE = Path(__file__).with_name("docs.html")

COMPLETIONS = Operation(
    "Goes on with prompts", (CompletionRequest,), Completion, chunk=Completion, errors=ANSWER_ERRORS
)
CHAT_COMPLETIONS = Operation(
    "Answers a chat", (ChatCompletionRequest,), ChatCompletion, chunk=ChatChunk, errors=ANSWER_ERRORS
)
EMBEDDINGS = Operation("The vectors of prompts", (EmbeddingRequest,), EmbeddingList, errors=ANSWER_ERRORS)
TOKENIZE = Operation(
    "The tokens of a prompt or a chat", (TokenizeRequest, TokenizeChatRequest), Tokens, errors=BODY_ERRORS
)
DETOKENIZE = Operation("The text of tokens", (DetokenizeRequest,), Prompt, errors=BODY_ERRORS)
HEALTH = Operation("Whether it lives", (), Status, errors=(503,))
READY = Operation("Whether it takes requests now", (), Status, errors=(503,))
PING = Operation("As /health", (), Status, errors=(503,))
TRACE = Operation("The last steps, as Perfetto reads them", (), dict, errors=(400, 503))
APPLY_TEMPLATE = Operation("The prompt of a chat", (ChatCompletionRequest,), Prompt, errors=BODY_ERRORS)
REFUSED_OF_MESSAGES: dict[str, tuple[Any, ...]] = dict.fromkeys(REFUSED, ())
RESPONSES = Operation(
    "Answers, as OpenAI's Responses API does", (ResponseRequest,), dict, chunk=dict, errors=ANSWER_ERRORS
)
STORED_RESPONSE = Operation("A response that is kept", (), dict, errors=(400, 404, 503))
MESSAGES = Operation(
    "Answers, as Anthropic's Messages API does", (MessageRequest,), dict, chunk=dict, errors=ANSWER_ERRORS
)
COUNT_TOKENS = Operation(
    "How many tokens a conversation has",
    (CountRequest,),
    dict,
    errors=BODY_ERRORS,
    neutral_values=REFUSED_OF_MESSAGES,
)


def create_app(
    engine: ServedEngine,
    *,
    served_model_names: list[str],
    admission: Admission | None = None,
    api_key: str | None = None,
    api_keys: Sequence[ApiKey] = (),
    open_metrics: bool = False,
    cors_origins: Sequence[str] = (),
    response_store_bytes: int = STORE_BYTES,
    response_store_seconds: float = STORE_SECONDS,
    max_body_bytes: int | None = None,
) -> Starlette:
    """The application in front of `engine`, which may still be starting.

    Args:
        served_model_names: Names that requests may give as `model`, "*" for any; the first stands in metrics.
        admission: Which requests are taken in; by default all that the engine takes.
        api_key: If set, what all paths but OPEN_PATHS ask for: this, or one of `api_keys`, which have limits.
        open_metrics: Whether METRICS_PATHS need no key either.
        cors_origins: Whose pages may ask from a browser, "*" for all; none by default.
        response_store_bytes, response_store_seconds: How many responses are kept, and how long after their last use.
        max_body_bytes: The longest body of a request; None: near what the longest sequence can need.
    """
    app = Starlette()
    add_error_handlers(app)
    keys = KeyRing(api_key, api_keys)
    open_paths = (*OPEN_PATHS, *METRICS_PATHS) if open_metrics else OPEN_PATHS
    app.add_middleware(KeyMiddleware, keys=keys, open_paths=open_paths)
    if cors_origins:
        # Outside the key's: a browser asks without it whether it may ask.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(HeadMiddleware)
    app.add_middleware(RequestIdMiddleware, quiet_paths=(*OPEN_PATHS, *METRICS_PATHS))
    names = [name for name in served_model_names if name != ANY_NAME] or [engine.config.model]
    if admission is None:
        admission = Admission(lambda: engine.stats)
    app.state.metrics = metrics = Metrics(engine, names[0])
    service = Service(
        engine,
        metrics,
        admission,
        names,
        ANY_NAME in served_model_names,
        max_body_bytes=max_body_bytes,
    )
    _add_generation(app, service)
    _add_responses(app, service, ResponseStore(response_store_bytes, response_store_seconds))
    _add_messages(app, service)
    _add_tokenization(app, service)
    _add_models(app, service)
    _add_operations(app, service, keys)
    _add_documentation(app, open_paths, has_key=not keys.is_open)
    return app


def _add_generation(app: Starlette, service: Service) -> None:
    @endpoint(app, "POST", "/v1/completions", COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await create_completion(service, request)

    @endpoint(app, "POST", "/v1/chat/completions", CHAT_COMPLETIONS)
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(service, request)

    @endpoint(app, "POST", "/v1/embeddings", EMBEDDINGS)
    async def embeddings(request: Request) -> Response:
        return await create_embeddings(service, request)


def _add_responses(app: Starlette, service: Service, store: ResponseStore) -> None:
    responses = ResponsesApi(service, store)

    @endpoint(app, "POST", "/v1/responses", RESPONSES)
    async def create_response(request: Request) -> Response:
        return await responses.create(request)

    @endpoint(app, "GET", "/v1/responses/{response_id}", STORED_RESPONSE)
    async def get_response(request: Request, response_id: str) -> Response:
        return await responses.get(request, response_id)

    @endpoint(app, "DELETE", "/v1/responses/{response_id}", STORED_RESPONSE)
    async def delete_response(request: Request, response_id: str) -> Response:
        return await responses.delete(request, response_id)

    @endpoint(app, "GET", "/v1/responses/{response_id}/input_items", STORED_RESPONSE)
    async def response_input_items(request: Request, response_id: str) -> Response:
        return await responses.list_input_items(request, response_id)


def _add_messages(app: Starlette, service: Service) -> None:
    @endpoint(app, "POST", "/v1/messages", MESSAGES)
    async def messages(request: Request) -> Response:
        return await create_message(service, request)

    @endpoint(app, "POST", "/v1/messages/count_tokens", COUNT_TOKENS)
    async def message_tokens(request: Request) -> Response:
        return await count_tokens(service, request)


def _add_tokenization(app: Starlette, service: Service) -> None:
    @endpoint(app, "POST", "/tokenize", TOKENIZE)
    async def tokens(request: Request) -> Response:
        return await tokenize(service, request)

    @endpoint(app, "POST", "/detokenize", DETOKENIZE)
    async def text(request: Request) -> Response:
        return await detokenize(service, request)

    @endpoint(app, "POST", "/apply-template", APPLY_TEMPLATE)
    async def prompt(request: Request) -> Response:
        return await apply_template(service, request)


def _add_models(app: Starlette, service: Service) -> None:
    def model_of(name: str) -> Model:
        engine = service.engine
        return Model(name, service.created, engine.config.model, engine.max_model_len)

    @endpoint(app, "GET", "/v1/models", Operation("The models", (), ModelList, errors=(503,)))
    async def models(request: Request) -> Response:
        service.check_alive()
        models = [model_of(name) for name in service.served_model_names]
        if is_anthropics(request):
            return json_response(anthropic_models(models))
        return json_response(ModelList(models, [codex_model(one.id, one.max_model_len) for one in models]))

    # Names of models may hold slashes.
    @endpoint(app, "GET", "/v1/models/{name:path}", Operation("A model", (), Model, errors=(404, 503)))
    async def model(name: str, request: Request) -> Response:
        service.check_alive()
        model = model_of(service.check_model(name))
        return json_response(anthropic_model(model) if is_anthropics(request) else model)


def _add_operations(app: Starlette, service: Service, keys: KeyRing) -> None:
    """What those ask who run the server."""

    @endpoint(app, "GET", "/health", HEALTH)
    async def health() -> Response:
        service.check_alive()
        return json_response(Status("healthy"))

    @endpoint(app, "GET", "/ready", READY)
    async def ready() -> Response:
        service.check_ready()
        if service.engine.status == "restarting":
            # What follows a colon may be an exception's text, which is the log's alone.
            cause = str(service.engine.error).partition(":")[0]
            raise ApiError(503, f"{cause}; the engine is started again", code="restarting")
        return json_response(Status("ready"))

    @endpoint(app, "GET POST", "/ping", PING)
    async def ping() -> Response:
        return await health()

    @endpoint(app, "GET", "/version", Operation("The server's version", (), Version))
    async def engine_version() -> Response:
        return json_response(Version(VERSION))

    @endpoint(app, "GET", "/metrics", Operation("Metrics for Prometheus", media_type="text/plain"))
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    turn = asyncio.Lock()

    @endpoint(app, "GET", "/debug/trace", TRACE)
    async def trace(request: Request) -> Response:
        return await create_trace(service, request, turn, sees_all=not keys.has_several)


def _add_documentation(app: Starlette, open_paths: Sequence[str], has_key: bool) -> None:
    @endpoint(app, "GET", "/openapi.json", Operation("This document", (), dict))
    async def document() -> Response:
        text = openapi(app.routes, open_paths, has_key, extra=(Message,))
        return Response(text, media_type="application/json")

    @endpoint(app, "GET", "/docs", Operation("This document, for people", media_type="text/html"))
    async def page() -> Response:
        return Response(DOCS_PAGE.read_bytes(), media_type="text/html; charset=utf-8")
