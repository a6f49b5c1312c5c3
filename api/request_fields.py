"""What fields of a request say that are neither sampling parameters nor the prompt."""

from __future__ import annotations

from api.errors import ApiError
from api.generation import new_id
from api.http import REQUEST_ID
from api.protocol import GenerationRequest


def answer_id(request: GenerationRequest, kind: str) -> str:
    """The answer's id: the request's own, or a new one of this kind.

    Raises:
        ApiError: 400, it cannot stand in a header.
    """
    if request.request_id is None:
        return new_id(kind)
    if not REQUEST_ID.fullmatch(request.request_id):
        raise ApiError(
            400, "request_id must be 1 to 128 visible characters of ASCII, without spaces", param="request_id"
        )
    return request.request_id


def read_cache_salt(given: str | None) -> str:
    """What keeps the request's cached blocks apart from those of others; "" if nothing does.

    Raises:
        ApiError: 400, it is empty.
    """
    if given == "":
        raise ApiError(400, "cache_salt must be a non-empty string", param="cache_salt")
    return given or ""


def read_timeout(given: float | None) -> float | None:
    """The seconds that a request may take; None: any.

    Raises:
        ApiError: 400, there are none.
    """
    if given is not None and not given > 0.0:
        raise ApiError(400, f"timeout must be above 0, got {given:g}", param="timeout")
    return given


def truncated(
    request: GenerationRequest, token_ids: list[int], max_model_len: int, max_tokens: int | None
) -> list[int]:
    """The prompt's tokens, as many as the request keeps: the last ones, or the first.

    Args:
        max_tokens: What -1 leaves room for, of which one must fit in any case; None: one token.

    Raises:
        ApiError: 400, it keeps none, or more than fit.
    """
    limit, field = request.truncate_prompt_tokens, "truncate_prompt_tokens"
    if limit is None:
        return token_ids
    if limit < -1 or limit == 0:
        raise ApiError(400, f"{field} must be -1 or at least 1, got {limit}", param=field)
    num_output = 1 if max_tokens is None else max_tokens
    room = max_model_len - min(num_output, 1)
    if limit > room:
        raise ApiError(
            400, f"{field} is {limit}; the context has room for a prompt of {room} tokens", param=field
        )
    if limit == -1:
        limit = max(1, max_model_len - num_output)
    return token_ids[:limit] if request.truncation_side == "right" else token_ids[-limit:]
