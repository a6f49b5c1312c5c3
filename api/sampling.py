"""From a request's fields to SamplingParams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from api.errors import ApiError
from api.protocol import GenerationRequest, without_nulls
from api.structured_outputs import named_by_form, structured_outputs_of
from engine.core.sampling_params import SAMPLING_PARAMETERS, SamplingParams
from engine.errors import RequestError

SAMPLING_FIELDS = tuple(
    parameter.name
    for parameter in SAMPLING_PARAMETERS
    if parameter.name not in ("max_tokens", "logprobs", "structured_outputs")
)
"""Fields of `GenerationRequest` that are sampling parameters as they stand. Two others differ by endpoint, and what
asks for a form of the answer has several names.
"""


def sampling_params(
    request: GenerationRequest, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """What the request gives goes before the model's `defaults`, and those before OpenAI's.

    Raises:
        RequestError: A field is out of range.
    """
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
    if request.logit_bias is not None:
        given["logit_bias"] = without_nulls(request.logit_bias)
    own = {
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "structured_outputs": structured_outputs_of(request),
    }
    return SamplingParams(**{**defaults, **given, **own})


def requested_max_tokens(request: GenerationRequest, least: int) -> int | None:
    """What the request asks for, under the newer name or the older.

    Args:
        least: 1, or 0 where nothing but the prompt's log-probabilities may be wanted.

    Raises:
        ApiError: 400, it is out of range under the newer name.
    """
    newer = request.max_completion_tokens
    if newer is None:
        return request.max_tokens
    if newer < least:
        field = "max_completion_tokens"
        raise ApiError(400, f"{field} must be at least {least}, got {newer}", param=field)
    return newer


@contextmanager
def named_as_asked(request: GenerationRequest) -> Iterator[None]:
    """Within it errors of the engine name the fields that the request has."""
    try:
        with named_by_form(request):
            yield
    except RequestError as error:
        if error.field == "max_tokens" and request.max_completion_tokens is not None:
            name = "max_completion_tokens"
            raise RequestError(f"{name}: {error}", name, error.code) from None
        raise
