"""Matchers: llguidance through its C interface (llguidance.h), which the library of its Python package exports.

The package's own classes hold the GIL while they sort a vocabulary: no stream moves for 0.15 s with 49k tokens, 1.6 s
with 262k. Calls of a C function hold none. What is known after microseconds holds it, which is faster than to ask for
it again.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Collection, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_MESSAGE = 2**14
"""Bytes that an error may take."""

_SPECIAL = b"\xff"
"""A special token's bytes begin with this, which no text does: forms get it by name alone."""

_END = b"<end>"
"""The token that ends a form of a model that has none; it lies beyond the vocabulary."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens, by id.

    Attributes:
        lengths: Bytes of each token, uint32; 0 where there is no token.
        data: All tokens' bytes. A special token's are 0xFF and its name.
    """

    lengths: bytes
    data: bytes

    @staticmethod
    def of(tokens: Sequence[bytes], special_token_ids: Collection[int]) -> Vocabulary:
        """The vocabulary of these tokens, by id; special ones are not text."""
        marked = list(tokens)
        for token_id in special_token_ids:
            marked[token_id] = _SPECIAL + marked[token_id]
        lengths = np.fromiter(map(len, marked), np.uint32, len(marked))
        return Vocabulary(lengths.tobytes(), b"".join(marked))


class _TokenizerInit(ctypes.Structure):
    """LlgTokenizerInitV2."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("vocab_size", c_uint32),
        ("tok_eos", c_uint32),
        ("token_lens", c_void_p),
        ("token_bytes", c_char_p),
        ("tokenizer_json", c_char_p),
        ("tokenize_assumes_string", c_bool),
        ("tokenize_fn", c_void_p),
        ("use_approximate_greedy_tokenize_fn", c_bool),
        ("tokenize_user_data", c_void_p),
        ("slices", c_void_p),
        ("tok_eos_extra", c_void_p),
        ("tok_eos_extra_count", c_uint32),
    )


class Limits(ctypes.Structure):
    """LlgParserLimits: what a form may cost, to compile and in each step."""

    _fields_ = (
        ("max_items_in_row", c_size_t),
        ("initial_lexer_fuel", c_uint64),
        ("step_lexer_fuel", c_uint64),
        ("step_max_items", c_size_t),
        ("max_lexer_states", c_size_t),
        ("max_grammar_size", c_size_t),
        ("precompute_large_lexemes", c_bool),
        ("verbose_errors", c_bool),
    )


class _ConstraintInit(ctypes.Structure):
    """LlgConstraintInit, with room for what later versions may append."""

    _fields_ = (
        ("tokenizer", c_void_p),
        ("log_buffer_level", c_uint32),
        ("log_stderr_level", c_uint32),
        ("ff_tokens_ok", c_bool),
        ("backtrack_ok", c_bool),
        ("limits", Limits),
        ("room", c_uint64 * 16),
    )


_SLOW: dict[str, tuple[Any, ...]] = {
    "llg_new_tokenizer_v2": (c_void_p, POINTER(_TokenizerInit), c_char_p, c_size_t),
    "llg_new_matcher": (c_void_p, POINTER(_ConstraintInit), c_char_p, c_char_p),
    "llg_clone_matcher": (c_void_p, c_void_p),
    "llg_validate_grammar": (c_int32, POINTER(_ConstraintInit), c_char_p, c_char_p, c_char_p, c_size_t),
    "llg_matcher_compute_mask_into": (c_int32, c_void_p, c_void_p, c_size_t),
    "llg_matcher_consume_tokens": (c_int32, c_void_p, c_void_p, c_size_t),
    "llg_free_tokenizer": (None, c_void_p),
    "llg_free_matcher": (None, c_void_p),
}
"""Functions by name: type of the result, then of the arguments. These hold no GIL."""

_FAST: dict[str, tuple[Any, ...]] = {
    "llg_constraint_init_set_defaults": (None, POINTER(_ConstraintInit), c_void_p),
    "llg_matcher_consume_token": (c_int32, c_void_p, c_uint32),
    "llg_matcher_is_stopped": (c_bool, c_void_p),
    "llg_matcher_get_error": (c_char_p, c_void_p),
}
"""Functions that hold the GIL."""


@functools.cache
def _functions() -> dict[str, Any]:
    """The C functions by name. The package is loaded with the first form: a start does not wait for it."""
    from llguidance import _lib

    functions = {}
    for library, prototypes in ((ctypes.CDLL, _SLOW), (ctypes.PyDLL, _FAST)):
        loaded = library(_lib.__file__)
        for name, (result, *arguments) in prototypes.items():
            function = functions[name] = loaded[name]
            function.restype, function.argtypes = result, arguments
    return functions


class TokenTrie:
    """A vocabulary as llguidance searches it; making it takes a second or two for 262k tokens, without the GIL.

    Args:
        vocab_size: Width of the model's logits. Ids without a token are never allowed.
        eos_token_ids: What may come where a form can end. A model without any gets one beyond its vocabulary.

    Attributes:
        num_tokens: The width, or one more with that end.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        lengths = np.frombuffer(vocabulary.lengths, np.uint32)[:vocab_size]
        data = vocabulary.data
        lengths = np.pad(lengths, (0, vocab_size - len(lengths)))
        end_ids = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size)
        if not end_ids:
            data = data[: int(lengths.sum())] + _END
            lengths, end_ids = np.append(lengths, np.uint32(len(_END))), [vocab_size]
        extra = np.array(end_ids[1:], np.uint32)
        init = _TokenizerInit(
            struct_size=ctypes.sizeof(_TokenizerInit),
            vocab_size=len(lengths),
            tok_eos=end_ids[0],
            token_lens=lengths.ctypes.data,
            token_bytes=data,
            # Nothing is ever cut into tokens: all ways to cut a forced text are allowed.
            use_approximate_greedy_tokenize_fn=True,
            tok_eos_extra=extra.ctypes.data,
            tok_eos_extra_count=len(extra),
        )
        message = ctypes.create_string_buffer(MAX_MESSAGE)
        handle = _functions()["llg_new_tokenizer_v2"](init, message, MAX_MESSAGE)
        if not handle:
            raise ValueError(f"llguidance does not take the vocabulary: {message.value.decode()}")
        weakref.finalize(self, _functions()["llg_free_tokenizer"], handle).atexit = False
        self.num_tokens = len(lengths)
        self._handle = handle

    def constraint(self) -> _ConstraintInit:
        """How grammars are compiled: silently, with llguidance's own limits, and errors that do not quote them."""
        init = _ConstraintInit()
        _functions()["llg_constraint_init_set_defaults"](init, self._handle)
        init.log_buffer_level = init.log_stderr_level = 0
        init.limits.verbose_errors = False
        return init


def grammar_problem(trie: TokenTrie, kind: str, source: str) -> str | None:
    """Why a grammar cannot be kept; None if it can.

    Args:
        kind: "lark" or "json_schema".
    """
    if "\0" in source:
        return "a NUL character is not taken; write it as an escape"
    message = ctypes.create_string_buffer(MAX_MESSAGE)
    status = _functions()["llg_validate_grammar"](
        trie.constraint(), kind.encode(), source.encode(), message, MAX_MESSAGE
    )
    return message.value.decode(errors="replace") if status < 0 else None


class Matcher:
    """A grammar, as far as tokens have come; used by one thread at a time.

    Raises:
        ValueError: The grammar cannot be compiled.
    """

    def __init__(self, trie: TokenTrie, lark: str) -> None:
        if "\0" in lark:
            raise ValueError("a NUL character is not taken; write it as an escape")
        self._own(trie, _functions()["llg_new_matcher"](trie.constraint(), b"lark", lark.encode()))
        self._check(-1 if self._error() is not None else 0)

    def copy(self) -> Matcher:
        """Another one at the same place."""
        matcher = Matcher.__new__(Matcher)
        matcher._own(self._trie, _functions()["llg_clone_matcher"](self._handle))
        return matcher

    def fill(self, mask: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Sets bit t % 32 of word t // 32 where token t may come, and no other; [ceil(num_tokens / 32)] int32.

        Raises:
            ValueError: The form cannot go on.
        """
        self._check(self._fill(self._handle, mask.ctypes.data, mask.nbytes))

    def consume(self, token_id: int) -> bool:
        """Goes past a token; whether nothing but the end can follow.

        Raises:
            ValueError: The form has no place for it.
        """
        self._check(self._consume(self._handle, token_id))
        return bool(self._is_stopped(self._handle))

    def consume_all(self, token_ids: Sequence[int]) -> None:
        """Goes past tokens.

        Raises:
            ValueError: The form has no place for one.
        """
        tokens = np.array(token_ids, np.uint32)
        self._check(_functions()["llg_matcher_consume_tokens"](self._handle, tokens.ctypes.data, len(tokens)))

    def _own(self, trie: TokenTrie, handle: int) -> None:
        functions = _functions()
        # The vocabulary must outlive it.
        self._trie, self._handle = trie, handle
        weakref.finalize(self, functions["llg_free_matcher"], handle).atexit = False
        self._fill = functions["llg_matcher_compute_mask_into"]
        self._consume = functions["llg_matcher_consume_token"]
        self._is_stopped = functions["llg_matcher_is_stopped"]

    def _error(self) -> bytes | None:
        message: bytes | None = _functions()["llg_matcher_get_error"](self._handle)
        return message

    def _check(self, status: int) -> None:
        if status < 0:
            raise ValueError((self._error() or b"").decode(errors="replace"))
