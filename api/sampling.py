"""From a request's fields to SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.protocol import GenerationRequest
from api.structured_outputs import structured_outputs_of
from engine.core.sampling_params import SAMPLING_PARAMETERS, SamplingParams

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
    own = {
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "structured_outputs": structured_outputs_of(request),
    }
    return SamplingParams(**{**defaults, **given, **own})
