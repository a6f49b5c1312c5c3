"""Reading a request's body and writing an answer's."""

from __future__ import annotations

import msgspec
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from api.errors import ApiError, ClientDisconnected

MAX_BODY_BYTES = 32 * 2**20


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, the body is longer than MAX_BODY_BYTES; 415, it is compressed.
        ClientDisconnected: The client hung up while it sent.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("identity", ""):
        raise ApiError(
            415,
            f"a body of Content-Encoding {encoding} is not read by this server; send it uncompressed",
            code="unsupported_content_encoding",
        )
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise too_large
    except ClientDisconnect:
        raise ClientDisconnected from None
    return bytes(body)


def json_response(content: msgspec.Struct, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), headers=headers, media_type="application/json")
