"""Tokens as bytes: what the decoders of byte-level and SentencePiece tokenizers do, one token at a time.

`tokenizers` decodes whole sequences. A stream needs each token's own bytes, because a character may be
spread over several tokens and the last of them may not have come yet.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from engine.errors import CheckpointError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class PieceDecoder:
    """The bytes of a tokenizer's tokens.

    Raises:
        CheckpointError: The tokenizer's decoder has a step that is not supported.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
        self._byte_of_char: dict[str, int] = {}
        self._space = ""
        self._byte_fallback = False
        self._strips_space = False
        if backend.decoder is None:
            raise CheckpointError("the tokenizer has no decoder: its tokens cannot become text")
        decoder = json.loads(backend.decoder.__getstate__())
        for step in decoder.get("decoders", [decoder]):
            self._add_step(step)

    def decode(self, token_id: int) -> bytes:
        """The token's bytes; none for an id without a token."""
        # The Rust side takes ids of 32 bits only.
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if piece is None:
            return b""
        if self._byte_of_char:
            # Added tokens are plain text, not written in the byte-level alphabet.
            is_plain = token_id in self._added or not self._byte_of_char.keys() >= set(piece)
            return piece.encode() if is_plain else bytes(self._byte_of_char[char] for char in piece)
        if self._byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.replace(self._space, " ").encode() if self._space else piece.encode()

    def strip_start(self, data: bytes) -> bytes:
        """`data` at the start of a text, without the space that the tokenizer itself puts there."""
        return data.removeprefix(b" ") if self._strips_space else data

    def _add_step(self, step: dict[str, Any]) -> None:
        """Take over one step of the decoder, as tokenizer.json describes it."""
        kind = step["type"]
        if kind == "ByteLevel":
            self._byte_of_char = byte_level_alphabet()
        elif kind == "Metaspace":
            self._space = step["replacement"]
            self._strips_space = step["prepend_scheme"] != "never"
        elif kind == "Replace" and step["content"] == " " and "String" in step["pattern"]:
            self._space = step["pattern"]["String"]
        elif kind == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            self._strips_space = True
        elif kind == "ByteFallback":
            self._byte_fallback = True
        elif kind != "Fuse":
            raise CheckpointError(f"the tokenizer's decoder step {json.dumps(step)} is not supported")


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
