"""Tokens that a directory names outside tokenizer.json, as transformers reads them.

Three generations of files: `added_tokens_decoder` of tokenizer_config.json, with ids and flags; before it
special_tokens_map.json and added_tokens.json, which are read where there is no such key; and roles ("eos_token") and
lists ("extra_special_tokens") of tokens that may stand nowhere else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from engine.errors import CheckpointError
from engine.loading.json_file import read_json

logger = logging.getLogger(__name__)

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_CONFIG = "tokenizer_config.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")


@dataclass(slots=True)
class NamedTokens:
    """What a directory says about tokens.

    Attributes:
        added: By id.
        roles: By role, a model's own ones too ("image_token").
        extra: Special tokens without a role.
    """

    added: dict[int, AddedToken] = field(default_factory=dict)
    roles: dict[str, AddedToken] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)


def read_named_tokens(path: Path, config: dict[str, Any]) -> NamedTokens:
    """
    Args:
        path: The directory.
        config: The keys of tokenizer_config.json.

    Raises:
        CheckpointError: A file is damaged, or does not hold tokens where they should be.
    """
    named = NamedTokens()
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        file = path / "special_tokens_map.json"
        config = config | read_json(file)
        _read_roles(named, config, file if file.exists() else path / _CONFIG)
        special = {token.content for token in [*named.roles.values(), *named.extra]}
        added_file = path / "added_tokens.json"
        for text, index in read_json(added_file).items():
            if type(index) is not int or index < 0:
                raise CheckpointError(f"{added_file}: {text!r}: expected an id, found {index!r}")
            named.added[index] = AddedToken(text, special=text in special, normalized=text not in special)
        return named
    if not isinstance(decoder, dict) or not all(index.isdecimal() for index in decoder):
        raise CheckpointError(
            f"{path / _CONFIG}: added_tokens_decoder: expected tokens by id, found {decoder!r}"
        )
    named.added = {
        int(index): _token(token, path / _CONFIG, f"added_tokens_decoder.{index}", is_special=False)
        for index, token in decoder.items()
    }
    _read_roles(named, config, path / _CONFIG)
    return named


def add_tokens(backend: tokenizers.Tokenizer, named: NamedTokens, path: Path) -> None:
    """Adds to a tokenizer what the directory names and tokenizer.json does not; flags of those files win.

    Args:
        path: Of the directory, for the log.
    """
    for index, token in sorted(named.added.items()):
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != index:
            logger.warning(
                "%s: the token %r is said to have id %d, and has %s", path, token.content, index, found
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in [*named.roles.values(), *named.extra]:
        if token.content not in known:
            backend.add_tokens([token])


def _read_roles(named: NamedTokens, config: dict[str, Any], file: Path) -> None:
    added = {token.content: token for token in named.added.values()}
    roles = {role: config.get(role) for role in ROLES}
    key = next((key for key in _EXTRA if config.get(key)), _EXTRA[0])
    extra = config.get(key) or []
    # A model's own roles: {"image_token": "<image>"}.
    roles |= config.get("model_specific_special_tokens") or {}
    if isinstance(extra, dict):
        roles, extra = {**roles, **extra}, []
    if not isinstance(extra, list):
        raise CheckpointError(f"{file}: {key}: expected a list of tokens, found {extra!r}")
    for role, value in roles.items():
        if value is not None:
            token = _token(value, file, role, is_special=True)
            named.roles[role] = added.get(token.content, token)
    named.extra = [_token(value, file, key, is_special=True) for value in extra]


def _token(value: Any, file: Path, key: str, is_special: bool) -> AddedToken:
    """A token: its text, or an object with flags.

    Args:
        is_special: What it is where the files do not say; a token with a role is special in any case.
    """
    flags = value if isinstance(value, dict) else {"content": value}
    content = flags.get("content")
    if not isinstance(content, str) or not all(isinstance(flags.get(flag, False), bool) for flag in _FLAGS):
        raise CheckpointError(f"{file}: {key}: expected a token, found {value!r}")
    given = {flag: flags[flag] for flag in _FLAGS if flag in flags}
    return AddedToken(
        content,
        **{"normalized": not is_special, **given, "special": is_special or flags.get("special", False)},
    )
