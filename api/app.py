"""The web application: which path does what, and who may ask."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from api.anthropic.endpoint import count_tokens, create_message
from api.anthropic.models import anthropic_model, anthropic_models, is_anthropics
from api.bodies import Model, ModelList, Status
from api.body import json_response
from api.chat import create_chat_completion
from api.completions import create_completion
from api.embeddings import create_embeddings
from api.errors import ApiError, add_error_handlers, error_response
from api.http import HeadMiddleware, RequestIdMiddleware
from api.metrics import Metrics
from api.responses.codex_models import codex_model
from api.responses.endpoint import ResponsesApi
from api.responses.store import STORE_BYTES, STORE_SECONDS, ResponseStore
from api.service import Service

if TYPE_CHECKING:
    from engine.frontend.async_engine import ServedEngine


class ApiKeyMiddleware:
    """Lets requests to /v1 pass that carry the key.

    As their bearer token, "bearer" in any case (RFC 9110, 11.1), as OpenAI's clients send it, or in the header
    X-Api-Key, as Anthropic's do.
    """

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1") and not self._has_key(scope):
            error = ApiError(
                401,
                "a valid API key is needed in the header Authorization: Bearer <key>",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await error_response(error, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip(" ")] if scheme.lower() == "bearer" else []
        given.append(headers.get("x-api-key", ""))
        return any(secrets.compare_digest(key.encode("latin-1"), self._key) for key in given)


def create_app(
    engine: ServedEngine,
    *,
    served_model_names: list[str],
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    response_store_bytes: int = STORE_BYTES,
    response_store_seconds: float = STORE_SECONDS,
) -> FastAPI:
    """The application in front of `engine`, which may still be starting.

    Args:
        served_model_names: Names that requests may give as `model`; the first stands in metrics.
        api_key: If set, what /v1 asks for.
        cors_origins: Whose pages may ask from a browser, "*" for all; none by default.
        response_store_bytes, response_store_seconds: How many responses are kept, and how long after their last use.
    """
    app = FastAPI(openapi_url=None)
    add_error_handlers(app)
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
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
    app.add_middleware(RequestIdMiddleware)
    service = Service(engine, Metrics(engine, served_model_names[0]), served_model_names)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await create_completion(service, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(service, request)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await create_embeddings(service, request)

    responses = ResponsesApi(service, ResponseStore(response_store_bytes, response_store_seconds))

    @app.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        return await responses.create(request)

    @app.get("/v1/responses/{response_id}")
    async def get_response(request: Request, response_id: str) -> Response:
        return await responses.get(request, response_id)

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        return await responses.delete(request, response_id)

    @app.get("/v1/responses/{response_id}/input_items")
    async def response_input_items(request: Request, response_id: str) -> Response:
        return await responses.list_input_items(request, response_id)

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        return await create_message(service, request)

    @app.post("/v1/messages/count_tokens")
    async def message_tokens(request: Request) -> Response:
        return await count_tokens(service, request)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.check_ready()
        models = [_model(service, name) for name in served_model_names]
        if is_anthropics(request):
            return json_response(anthropic_models(models))
        return json_response(ModelList(models, [codex_model(one.id, one.max_model_len) for one in models]))

    # Names of models may hold slashes.
    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        service.check_ready()
        model = _model(service, service.check_model(name))
        return json_response(anthropic_model(model) if is_anthropics(request) else model)

    @app.get("/health")
    async def health() -> Response:
        service.check_ready()
        return json_response(Status("healthy"))

    @app.get("/ready")
    async def ready() -> Response:
        service.check_ready()
        if engine.status == "restarting":
            raise ApiError(503, f"the engine is started again: {engine.error}", code="restarting")
        return json_response(Status("ready"))

    @app.get("/version")
    async def engine_version() -> Response:
        return Response(
            msgspec.json.encode({"version": version("llm-engine")}), media_type="application/json"
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _model(service: Service, name: str) -> Model:
    return Model(name, service.created, service.engine.max_model_len)
