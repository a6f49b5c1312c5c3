"""The most that a connection may ask of the server before its request is understood; docs/limits.md shows it.

What a request itself may ask for is limited in `engine.core.limits`.
"""

from __future__ import annotations

from engine.core.limits import Limit

MAX_HEAD_BYTES = 64 * 2**10
MAX_HEADERS = 128
MAX_PIPELINED = 16
HEAD_SECONDS = 30.0
BODY_SECONDS = 120.0
KEEP_ALIVE_SECONDS = 60
"""Longer than common clients keep an idle connection, so that it is they who close it."""

LEAST_BODY_BYTES = 2 * 2**20
BODY_BYTES_PER_TOKEN = 16
"""Three to four times what English text has, and more than token ids or escaped Chinese have."""

BODIES_AT_A_TIME = 16
"""So many of the longest bodies may be on their way at a time, or more that are shorter."""

CONNECTION_LIMITS = (
    Limit(
        "head", MAX_HEAD_BYTES, "bytes of request line and headers; so many of chunk sizes and trailers, too"
    ),
    Limit("headers", MAX_HEADERS, "headers and trailers"),
    Limit("head", HEAD_SECONDS, "seconds from its first byte to its last"),
    Limit("body", BODY_SECONDS, "seconds from the head's end to its own"),
    Limit("connection", KEEP_ALIVE_SECONDS, "seconds without a request"),
    Limit("connection", MAX_PIPELINED, "requests that wait for the answer to one before them"),
)


def default_max_body_bytes(max_model_len: int) -> int:
    """The longest body, where nobody has said: near what the longest sequence can need."""
    return max(LEAST_BODY_BYTES, BODY_BYTES_PER_TOKEN * max_model_len)
