"""Refusing a request that cannot be served, before it reaches the engine."""

from __future__ import annotations

from collections.abc import Collection

from engine.core.bans import TokenSequence
from engine.core.pooling_params import PoolingParams
from engine.core.sampling_params import SamplingParams
from engine.errors import RequestError

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""OpenAI's code, on which agents shorten a conversation and try again."""


def validate_request(
    prompt_token_ids: list[int],
    params: SamplingParams,
    max_model_len: int,
    vocab_size: int,
    eos_token_ids: Collection[int],
    clips_max_tokens: bool,
    bad_words: Collection[TokenSequence] = (),
    max_num_seqs: int | None = None,
) -> None:
    """Checks what depends on the model; `SamplingParams` has checked the rest.

    Args:
        clips_max_tokens: A sequence that wants more than fits beside its prompt gets what fits.
        bad_words: As in `Request`.
        max_num_seqs: Most samples that a request among others may have; None: there are no others.

    Raises:
        RequestError: Names the field, the value and the limit.
    """
    if max_num_seqs is not None and params.n > max_num_seqs:
        raise RequestError(
            f"n is {params.n}; a step has room for {max_num_seqs} samples (--max-num-seqs)", "n"
        )
    if not prompt_token_ids:
        raise RequestError("prompt must hold at least one token", "prompt")
    if len(prompt_token_ids) + (params.max_tokens != 0) > max_model_len:
        output = ", at least one of them for the output" if params.max_tokens != 0 else ""
        raise RequestError(
            f"prompt has {len(prompt_token_ids)} tokens; the context holds {max_model_len}{output}",
            "prompt",
            CONTEXT_LENGTH_EXCEEDED,
        )
    room = max_model_len - len(prompt_token_ids)
    if params.max_tokens is not None and params.max_tokens > room and not clips_max_tokens:
        raise RequestError(
            f"max_tokens is {params.max_tokens} and the prompt has {len(prompt_token_ids)} tokens; the context holds "
            f"{max_model_len}: at most {room} fit beside it (--clip-max-tokens lowers such a max_tokens)",
            "max_tokens",
            CONTEXT_LENGTH_EXCEEDED,
        )
    _check_ids("prompt", prompt_token_ids, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    if params.min_tokens > 0 and len({*eos_token_ids, *params.stop_token_ids}) >= vocab_size:
        raise RequestError(
            f"stop_token_ids and the end tokens are all {vocab_size} tokens, and none may come before min_tokens "
            f"({params.min_tokens})",
            "stop_token_ids",
        )
    _check_bans(params, vocab_size, eos_token_ids, bad_words)


def validate_embedding(
    prompt_token_ids: list[int],
    params: PoolingParams,
    max_model_len: int,
    vocab_size: int,
    hidden_size: int,
    field: str,
) -> None:
    """Checks what depends on the model; `PoolingParams` has checked the rest.

    Args:
        field: What the prompt is called.

    Raises:
        RequestError: Names the field, the value and the limit.
    """
    if not prompt_token_ids:
        raise RequestError(f"{field} must hold at least one token", field)
    if len(prompt_token_ids) > max_model_len:
        raise RequestError(
            f"{field} has {len(prompt_token_ids)} tokens; the context holds {max_model_len}",
            field,
            CONTEXT_LENGTH_EXCEEDED,
        )
    _check_ids(field, prompt_token_ids, vocab_size)
    if params.dimensions is not None and params.dimensions > hidden_size:
        raise RequestError(
            f"dimensions must be at most {hidden_size}, the model's, got {params.dimensions}", "dimensions"
        )


def _check_bans(
    params: SamplingParams,
    vocab_size: int,
    eos_token_ids: Collection[int],
    bad_words: Collection[TokenSequence],
) -> None:
    """Refuses what is known to leave no token to the first draw."""
    banned = {word[-1] for word in bad_words if len(word) == 1}
    if params.min_tokens > 0:
        # A form may end where nothing else can be.
        banned |= {*params.stop_token_ids, *(() if params.structured_outputs else eos_token_ids)}
    allowed = params.allowed_token_ids
    if all(token_id in banned for token_id in (range(vocab_size) if allowed is None else allowed)):
        what = "all tokens of the vocabulary" if allowed is None else "all of allowed_token_ids"
        raise RequestError(
            f"{what} are banned: by bad_words, or before min_tokens as the end or in stop_token_ids",
            "bad_words" if allowed is None else "allowed_token_ids",
        )


def _check_ids(
    field: str, token_ids: list[int] | tuple[int, ...] | dict[int, float], vocab_size: int
) -> None:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    raise RequestError(f"{field} holds token id {wrong}; the vocabulary has ids 0 to {vocab_size - 1}", field)
