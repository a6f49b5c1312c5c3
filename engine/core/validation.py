"""Refusing a request that cannot be served, before it reaches the engine."""

from __future__ import annotations

from engine.core.sampling_params import SamplingParams
from engine.errors import RequestError

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""OpenAI's code, on which agents shorten a conversation and try again."""


def validate_request(
    prompt_token_ids: list[int], params: SamplingParams, max_model_len: int, vocab_size: int
) -> None:
    """Checks what depends on the model; `SamplingParams` has checked the rest.

    Raises:
        RequestError: Names the field, the value and the limit.
    """
    if not prompt_token_ids:
        raise RequestError("prompt must hold at least one token", "prompt")
    if len(prompt_token_ids) >= max_model_len:
        raise RequestError(
            f"prompt has {len(prompt_token_ids)} tokens; the context holds {max_model_len}, "
            "at least one of them for the output",
            "prompt",
            CONTEXT_LENGTH_EXCEEDED,
        )
    _check_ids("prompt", prompt_token_ids, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)


def _check_ids(
    field: str, token_ids: list[int] | tuple[int, ...] | dict[int, float], vocab_size: int
) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{field} holds token id {token_id}; the vocabulary has ids 0 to {vocab_size - 1}", field
            )
