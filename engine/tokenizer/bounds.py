"""How much text a token stands for at most, which tells of a text that it is too long before it is tokenized.

A bound holds where it is known what is dropped on the way to the tokens, and nothing unknown becomes one token for
many bytes: for BPE over bytes, or with a token for every byte that it falls back on. It does not hold where a step
removes text or white space, an added token swallows the white space beside it, or words are whole ("[UNK]").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models

from engine.tokenizer.pieces import byte_level_alphabet

COMPOSITION = 4
"""How many times shorter a text can become in UTF-8 when its characters are composed: at most 3.5 times (U+0390)."""

_NOT_IN_UTF_8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclass(frozen=True, slots=True)
class TextBound:
    """What is known of how much a token stands for.

    Attributes:
        bytes_per_token: At most, in UTF-8.
        dropped: Bytes that the vocabulary does not have: they vanish, or many become one token.
    """

    bytes_per_token: int
    dropped: bytes = b""

    def least_tokens(self, text: str) -> int:
        """The fewest tokens that `text` can have.

        Raises:
            UnicodeEncodeError: It is not valid Unicode.
        """
        return -(-len(text.encode().translate(None, self.dropped)) // self.bytes_per_token)


def text_bound(backend: tokenizers.Tokenizer) -> TextBound | None:
    """The bound of a tokenizer; None: there is none.

    Goes through the vocabulary, which takes a tenth of a second, a second for 262144 tokens.
    """
    shortening = _shortening(_steps(backend.normalizer, "normalizers"))
    steps = _steps(backend.pre_tokenizer, "pretokenizers")
    added = backend.get_added_tokens_decoder().values()
    if shortening is None or not all(map(_keeps_text, steps)):
        return None
    if any(token.lstrip or token.rstrip for token in added):
        return None
    model = backend.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    is_over_bytes = any(step["type"] == "ByteLevel" for step in steps)
    if is_over_bytes:
        dropped = bytes(byte for char, byte in byte_level_alphabet().items() if char not in vocabulary)
    elif model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        dropped = b""
    else:
        return None
    if shortening > 1 and not set(dropped) <= _NOT_IN_UTF_8:
        return None
    # Over bytes, each character of a token's name stands for one.
    longest = max(map(len if is_over_bytes else _num_bytes, vocabulary))
    return TextBound(shortening * max(longest, *(_num_bytes(token.content) for token in added), 1), dropped)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _steps(part: Any, members: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as tokenizer.json has them; it may be None, or a sequence."""
    if part is None:
        return []
    return _flat(json.loads(part.__getstate__()), members)


def _flat(step: dict[str, Any], members: str) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for one in step[members] for inner in _flat(one, members)]


def _shortening(steps: list[dict[str, Any]]) -> int | None:
    """How many times shorter the steps of a normalizer can make a text; None: there is no bound."""
    factor = 1
    for step in steps:
        match step:
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(text)}, "content": str(content)} if _num_bytes(
                content
            ) >= _num_bytes(text):
                pass
            case {"type": "NFC" | "NFD"}:
                factor *= COMPOSITION
            case _:
                return None
    return factor


def _keeps_text(step: dict[str, Any]) -> bool:
    """Whether a step of a pre-tokenizer drops nothing."""
    match step:
        case {"type": "ByteLevel" | "Metaspace" | "Digits"}:
            return True
        case {"type": "Split" | "Punctuation", "behavior": str(behavior)}:
            return behavior != "Removed"
    return False
