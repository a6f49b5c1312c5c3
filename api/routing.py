"""Routes of endpoints that read their requests themselves."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

if TYPE_CHECKING:
    from api.openapi import Operation

Endpoint = Callable[..., Coroutine[Any, Any, Response]]
"""Takes those of the request and the path's parameters that it names."""


class EndpointRoute(Route):
    """Calls an endpoint with what it names, and nothing between the two: the application answers errors.

    Attributes:
        operation: What the endpoint does.
    """

    def __init__(self, path: str, endpoint: Endpoint, operation: Operation, methods: Sequence[str]) -> None:
        super().__init__(path, endpoint)
        # HEAD never comes here: `api.http.HeadMiddleware` makes it GET.
        self.methods = set(methods)
        self.operation = operation
        self.app = self._answer
        self._names = tuple(signature(endpoint).parameters)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        values = {**scope["path_params"], "request": Request(scope, receive, send)}
        response: Response = await self.endpoint(**{name: values[name] for name in self._names})
        await response(scope, receive, send)


def endpoint(app: Starlette, methods: str, path: str, operation: Operation) -> Callable[[Endpoint], Endpoint]:
    """Makes a function the one that answers these methods of a path.

    Args:
        methods: One, or several with blanks between them.
    """

    def add(function: Endpoint) -> Endpoint:
        app.routes.append(EndpointRoute(path, function, operation, methods.split()))
        return function

    return add
