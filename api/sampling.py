"""From a request's fields to SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.protocol import GenerationRequest
from engine.core.sampling_params import SAMPLING_PARAMETERS, SamplingParams

SAMPLING_FIELDS = tuple(
    parameter.name for parameter in SAMPLING_PARAMETERS if parameter.name not in ("max_tokens", "logprobs")
)
"""Fields of `GenerationRequest` that are sampling parameters as they stand; the two others differ by endpoint."""


def sampling_params(
    request: GenerationRequest, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """What the request gives goes before the model's `defaults`, and those before OpenAI's.

    Raises:
        RequestError: A field is out of range.
    """
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
    return SamplingParams(**{**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs})
