"""What programs pass as prompts: text, token ids, or many of them, in the types that people have them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from engine.errors import RequestError

Prompt = str | list[int]
"""Text or token ids."""

_WANTED = 'text, token ids, {"prompt": text}, {"prompt_token_ids": ids}, or several of these'


def read_prompts(prompts: Any) -> list[Prompt]:
    """One prompt, or as many as there are.

    Args:
        prompts: Text; token ids in a list, an array or a tensor of one dimension; a dictionary with "prompt" or
            "prompt_token_ids"; or several of these: a list, a generator, an array or tensor of two dimensions.

    Raises:
        RequestError: It is something else; names it.
    """
    prompts = _plain(prompts)
    if isinstance(prompts, str | Mapping):
        return [_read_prompt(prompts)]
    items = _items(prompts)
    if items and all(isinstance(item, Integral) for item in items):
        return [_read_prompt(items)]
    return [_read_prompt(_plain(item)) for item in items]


def _read_prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        # What a key that is not known here asks for would be left out without a word.
        if not keys or not keys <= {"prompt", "prompt_token_ids"}:
            found = sorted(map(str, prompt))
            raise RequestError(f"prompts: expected {_WANTED}, found a dictionary of {found}", "prompt")
        # Token ids say more than the text they came from.
        return _read_prompt(_plain(prompt["prompt_token_ids" if "prompt_token_ids" in keys else "prompt"]))
    if isinstance(prompt, str):
        return prompt
    items = _items(prompt)
    wrong = next((item for item in items if not isinstance(item, Integral) or isinstance(item, bool)), None)
    if wrong is not None:
        raise RequestError(f"prompts: expected token ids, found {wrong!r} among them", "prompt")
    return [int(item) for item in items]


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists of numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _items(value: Any) -> list[Any]:
    if isinstance(value, bytes | bytearray) or not isinstance(value, Iterable):
        raise RequestError(f"prompts: expected {_WANTED}, found {value!r}", "prompt")
    return list(value)
