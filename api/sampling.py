"""From a request's fields to SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.protocol import GenerationRequest
from engine.core.sampling_params import SamplingParams

SAMPLING_FIELDS = (
    "n",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "logit_bias",
)


def sampling_params(
    request: GenerationRequest, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """What the request gives goes before the model's `defaults`, and those before OpenAI's.

    Raises:
        RequestError: A field is out of range.
    """
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
    return SamplingParams(**{**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs})
