"""Routes of endpoints that read their requests themselves."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from inspect import signature
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute


class EndpointRoute(APIRoute):
    """Calls its endpoint with those of the request and the path's parameters that it names.

    FastAPI's own looks into each request for what endpoints may declare: bodies, forms, dependencies. None does here.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        names = tuple(signature(self.endpoint).parameters)

        async def handle(request: Request) -> Response:
            values = {**request.path_params, "request": request}
            response: Response = await self.endpoint(**{name: values[name] for name in names})
            return response

        return handle
