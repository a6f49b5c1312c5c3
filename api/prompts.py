"""Prompts as OpenAI's completions and embeddings take them: text, token ids, or lists of either."""

from __future__ import annotations

from collections.abc import Sequence

from api.errors import ApiError
from engine.tokenizer.tokenizer import Tokenizer

Prompt = str | list[int]


def split_prompts(prompt: str | list[str | int | list[int]], field: str) -> list[Prompt]:
    """One string, one list of token ids, or a list of either → a list of prompts.

    Args:
        field: What the request calls it.

    Raises:
        ApiError: 400, an empty list, or token ids beside prompts.
    """
    if isinstance(prompt, str):
        return [prompt]
    token_ids = [item for item in prompt if isinstance(item, int)]
    prompts = [item for item in prompt if not isinstance(item, int)]
    if not prompt or (token_ids and prompts):
        raise ApiError(
            400,
            f"{field} must be a string, a list of token ids, or a list of one or more of these",
            param=field,
        )
    return prompts or [token_ids]


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], adds_special_tokens: bool = True
) -> list[list[int]]:
    """The prompts as token ids; a text's with those that the tokenizer adds, such as BOS, if so asked.

    Raises:
        RequestError: A text is too long for certain, or not valid Unicode.
    """
    return [
        tokenizer.encode(prompt, adds_special_tokens) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
