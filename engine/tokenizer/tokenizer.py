"""Tokenizer: text to token ids and back, chat templates, and text from tokens as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from encodings.utf_8 import IncrementalDecoder
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from engine.core.matcher import Vocabulary
from engine.core.validation import CONTEXT_LENGTH_EXCEEDED
from engine.errors import RequestError
from engine.tokenizer.bounds import TextBound, text_bound
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.files import TokenizerSettings, byte_tokenizer, has_tokenizer, read_tokenizer
from engine.tokenizer.pieces import PieceDecoder


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        vocab_size: One more than the highest token id; a model's logits may be wider (padding).
        bos_token_id: The beginning-of-sequence token, if the model has one.
        eos_token_ids: Every token that ends a generation.
        special_token_ids: The tokens that `skip_special_tokens` leaves out of text.
        max_tokens: Text that is longer for certain is refused before it is tokenized; None: none is.
    """

    max_tokens: int | None = None

    def __init__(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._pieces = PieceDecoder(backend)
        self._bytes: dict[int, bytes] = {}
        self._bad_words = lru_cache(16)(self._encode_bad_words)
        named = {role: backend.token_to_id(text) for role, text in settings.special_tokens.items()}
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(
            [token_id for token_id, token in added.items() if token.special]
            + [token_id for token_id in named.values() if token_id is not None]
        )
        self.bos_token_id: int | None = named.get("bos_token")
        self.eos_token_ids = settings.eos_token_ids
        # Added tokens may lie beyond the vocabulary, with a gap.
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._settings.chat_templates)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token that is written `text`; None if there is none."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self.special_token_ids else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`; special tokens written in it become their ids.

        Args:
            add_special_tokens: Add BOS (or whatever the model adds) as the tokenizer's own rule says.

        Other threads run meanwhile, however long the text is.

        Raises:
            RequestError: The text is not valid Unicode, or has more than `max_tokens` for certain.
        """
        return self._encode(text, add_special_tokens, "prompt")

    def encode_bad_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of words that an output may not have, each as it begins a text and as it follows a space.

        Those of the latest requests are remembered: each prompt of a request asks for them.

        Raises:
            RequestError: A word has no tokens, or is not valid Unicode.
        """
        return self._bad_words(tuple(words))

    def _encode_bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip(" ")
            encoded = [tuple(self._encode(text, False, "bad_words")) for text in (bare, f" {bare}")]
            if not any(encoded):
                raise RequestError(f"bad_words: {word!r} has no tokens in this vocabulary", "bad_words")
            found |= dict.fromkeys(filter(None, encoded))
        return tuple(found)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped)
        return self._pieces.strip_start(data).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, which may be no text; None for an id without a token."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes: perhaps a part of a character; none for an id without a token."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._pieces.decode(token_id)
        return data

    def vocabulary(self) -> Vocabulary:
        """All tokens as bytes; takes up to a second or two."""
        tokens = [self._pieces.decode(token_id) for token_id in range(self.vocab_size)]
        return Vocabulary.of(tokens, self.special_token_ids)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        continue_final_message: bool = False,
        **template_arguments: Any,
    ) -> str:
        """The prompt's text for `messages`, which ends where the assistant's answer begins.

        Args:
            messages: Contents are text, or parts of text, which reach templates that walk them as they are, and
                others as one text, a line a part. Keys that are None are left out, but for the content of a
                message with calls.
            continue_final_message: The text ends where the last message's content does.
            template_arguments: Passed on to the template: tools, enable_thinking, and
                add_generation_prompt, which is True by default.

        Raises:
            RequestError: The model has no chat template, or the messages are not what it takes.
        """
        templates = self._templates
        if not templates:
            raise RequestError(
                "the model has no chat template; use /v1/completions with a plain prompt", "messages"
            )
        name = "tool_use" if template_arguments.get("tools") and "tool_use" in templates else "default"
        if name not in templates:
            raise RequestError("the model's chat templates have no default", "messages")
        template = templates[name]
        plain = [_checked(message, template.walks_parts) for message in messages]
        # Templates ask whether tools and documents are none, not whether they are defined.
        arguments = {"add_generation_prompt": True, "tools": None, "documents": None, **template_arguments}
        if not continue_final_message:
            return template.render(plain, **arguments)
        return template.render_open(plain, **{**arguments, "add_generation_prompt": False})

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        continue_final_message: bool = False,
        **template_arguments: Any,
    ) -> list[int]:
        """The token ids of `apply_chat_template`; templates write BOS themselves, so none is added."""
        text = self.apply_chat_template(messages, continue_final_message, **template_arguments)
        return self._encode(text, add_special_tokens=False, field="messages")

    def strip_start(self, data: bytes) -> bytes:
        """`data` as `decode` begins a text with it: some tokenizers put a space there that is not text."""
        return self._pieces.strip_start(data)

    def _encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        try:
            self._check_length(text, field)
            # A batch, even of one: only that lets go of the interpreter's lock.
            [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("the text is not valid Unicode: it has a lone surrogate", field) from error
        return encoding.ids

    def _check_length(self, text: str, field: str) -> None:
        if self.max_tokens is None or self.bound is None:
            return
        least = self.bound.least_tokens(text)
        if least > self.max_tokens:
            raise RequestError(
                f"prompt is too long: {least} tokens > {self.max_tokens} maximum, at the least: no token stands for "
                f"more than {self.bound.bytes_per_token} bytes",
                field,
                CONTEXT_LENGTH_EXCEEDED,
            )

    @cached_property
    def bound(self) -> TextBound | None:
        """How much text a token stands for, where that is known; takes up to a second the first time."""
        return text_bound(self._backend)

    @cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        variables = dict(self._settings.special_tokens)
        sources = self._settings.chat_templates
        return {name: ChatTemplate(source, variables) for name, source in sources.items()}


class IncrementalDetokenizer:
    """The text of a growing output, piece by piece; complete characters only.

    The pieces joined are what the output adds to the text of the prompt: `decode(prompt + output)`
    without `decode(prompt)`. Where the prompt ends amid a character, the output's text begins with it.

    Args:
        keeps_start: The text is the tokens' bytes and nothing else, at the start of a text, too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool,
        keeps_start: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = IncrementalDecoder("replace")
        self._at_start = not keeps_start and not any(
            tokenizer.token_bytes(token_id) for token_id in prompt_token_ids if token_id not in self._skipped
        )
        self._decoder.decode(self._tail(prompt_token_ids))

    def push(self, token_id: int) -> str:
        """The new text that `token_id` completes, perhaps none."""
        data = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
        if self._at_start and data:
            self._at_start = False
            data = self._tokenizer.strip_start(data)
        if data.isascii() and not self._decoder.buffer:
            # As it mostly is: no character is unfinished, before or after it.
            return data.decode("ascii")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What was held back: U+FFFD if the output ends amid a character."""
        return self._decoder.decode(b"", final=True)

    def _tail(self, token_ids: Sequence[int]) -> bytes:
        """The prompt's last bytes: enough to hold an unfinished character, whole from its first byte."""
        tail = b""
        for token_id in reversed(token_ids):
            if token_id not in self._skipped:
                tail = self._tokenizer.token_bytes(token_id) + tail
            if len(tail) >= 4:
                break
        # Continuation bytes at the front belong to a character that is complete, or were never valid.
        return tail.lstrip(bytes(range(0x80, 0xC0)))


def load_tokenizer(path: Path, may_stand_in: bool = False) -> Tokenizer:
    """The tokenizer of a GGUF file or a model directory; reads no weights.

    Args:
        may_stand_in: A directory without a tokenizer gets one whose tokens are bytes.

    Raises:
        CheckpointError: The tokenizer's files are missing, damaged or of an unsupported kind.
    """
    if may_stand_in and path.is_dir() and not has_tokenizer(path):
        return Tokenizer(byte_tokenizer(), TokenizerSettings({}, (), {}))
    return Tokenizer(*read_tokenizer(path))


def _checked(message: Any, walks_parts: bool) -> dict[str, Any]:
    """The message without what is None, its parts joined unless the template takes them."""
    if not isinstance(message, dict):
        raise RequestError("each message must be an object", "messages")
    # Some templates ask whether the content of a message with calls is none, and others write it.
    kept = ("content",) if message.get("tool_calls") else ()
    message = {key: value for key, value in message.items() if value is not None or key in kept}
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise RequestError("the model takes text only: content parts must be of type text", "messages")
    if walks_parts:
        return message
    return {**message, "content": "\n".join(part["text"] for part in parts)}
