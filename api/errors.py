"""Errors: a status, and a body in the shape that the endpoint's clients expect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import EngineDeadError, RequestError
from engine.logs import note_request


class ApiError(Exception):
    """A request that ends with an HTTP error.

    Attributes:
        status: HTTP status.
        param: The request field at fault.
        code: A word that programs can test for.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers


class ClientDisconnected(Exception):
    """The client hung up before its answer was ready."""


def not_supported(what: str, field: str | None = None) -> ApiError:
    """The error for something that OpenAI knows and this server does not; `field` if `what` says more."""
    return ApiError(
        400, f"{what} is not supported by this server", param=field or what, code="unsupported_parameter"
    )


def retry_later(status: int, why: str, code: str, seconds: float) -> ApiError:
    """The error for what may be taken in after so many seconds, which Retry-After tells."""
    wait = max(1, math.ceil(seconds))
    return ApiError(status, f"{why}; try again in {wait} s", code=code, headers={"retry-after": str(wait)})


def engine_dead() -> ApiError:
    """The error once the engine has ended: the cause may be an exception's text, which is not a client's to read."""
    return ApiError(503, "the engine has ended; the server's log has the cause", code="engine_dead")


def to_api_error(error: Exception) -> ApiError:
    """The HTTP error that tells a client of `error`; of one that nobody planned for, its type alone."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.field, code=error.code)
        case EngineDeadError():
            return engine_dead()
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log has the details")


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """As OpenAI's clients expect it."""

    error: ErrorDetail


class AnthropicErrorCode(msgspec.Struct):
    error_code: str


class AnthropicErrorDetail(msgspec.Struct):
    type: str
    message: str
    details: AnthropicErrorCode | msgspec.UnsetType = msgspec.UNSET


class AnthropicErrorBody(msgspec.Struct):
    """As Anthropic's clients expect it."""

    error: AnthropicErrorDetail
    type: Literal["error"] = "error"


def openai_error(error: ApiError) -> ErrorBody:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return ErrorBody(ErrorDetail(error.message, kind, error.param, error.code))


ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's types of errors, by status."""

NO_THREADS = "thread_unsupported_request"
"""The code, one of Anthropic's own, on which clients send the whole conversation in place of a part."""


def anthropic_error(error: ApiError) -> AnthropicErrorBody:
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    detail = AnthropicErrorDetail(ANTHROPIC_KINDS.get(error.status, kind), error.message)
    if error.code == NO_THREADS:
        detail.details = AnthropicErrorCode(NO_THREADS)
    return AnthropicErrorBody(detail)


ErrorShape = Callable[[ApiError], msgspec.Struct]


def error_shape(path: str) -> ErrorShape:
    """How the clients of a path expect errors."""
    return anthropic_error if path.startswith("/v1/messages") else openai_error


def error_response(error: ApiError, path: str) -> Response:
    if error.code is not None:
        note_request(code=error.code)
    return Response(
        msgspec.json.encode(error_shape(path)(error)),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(to_api_error(error), request.url.path)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    what = {404: "no such path", 405: "this path does not take this method"}.get(
        error.status_code, error.detail
    )
    message = f"{what}: {request.method} {path}"
    return error_response(ApiError(error.status_code, message, headers=error.headers), path)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    # Nobody reads it; 499 is the status that proxies log for a client that went away.
    return Response(status_code=499)


def add_error_handlers(app: Starlette) -> None:
    for kind in (ApiError, RequestError, EngineDeadError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientDisconnected, _answer_nobody)
