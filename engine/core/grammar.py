"""Grammars: which tokens the form of an answer allows next. llguidance matches; its work is done in threads.

    update: a token is appended ─► advance ─► a thread fills the next mask │ meanwhile plan, forward pass ─► draws

Matcher and mask are a function of the form and the sequence's tokens so far, whatever the steps were. Matching holds
no GIL, so that a mask is made while the model computes. The package is imported with the first form: a start does not
wait for it.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.core.bans import Bitmask, bitmask_of
from engine.core.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_COMPILED = 256
"""Compiled forms that are kept for requests to come."""

_HEADER = '%llguidance {"no_forcing": true}\n'
"""Every way to cut a forced text into tokens is allowed: the model chooses, and no tokenizer is asked for one."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens, by id.

    Attributes:
        tokens: Each one's bytes; none where there is no token. A special token's are its name.
        special_token_ids: Tokens that are not text: a form must name them to get them.
    """

    tokens: list[bytes]
    special_token_ids: list[int]


def limits() -> LLParserLimits:
    """What a form may cost, to compile and in each step: llguidance's own limits. Errors do not quote the form."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def lark_of(structured: StructuredOutputs) -> str:
    """A form as llguidance's Lark.

    Raises:
        ValueError: A GBNF grammar that cannot be read.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    schema = structured.schema
    if schema is not None:
        if structured.whitespace_pattern is not None:
            options = {"x-guidance": {"whitespace_pattern": structured.whitespace_pattern}}
            # "x-guidance" is read at the top of an object alone.
            schema = options | (schema if isinstance(schema, dict) else {"allOf": [schema]})
        return f"start: %json {json.dumps(schema, ensure_ascii=False)}\n"
    if structured.regex is not None:
        compiled = json.loads(LLMatcher.grammar_from_regex(structured.regex))
        return str(compiled["grammars"][0]["lark_grammar"])
    if structured.choice:
        choices = (json.dumps(choice, ensure_ascii=False) for choice in structured.choice)
        return f"start: {' | '.join(choices)}\n"
    assert structured.grammar is not None
    try:
        return any_to_lark(structured.grammar)
    except Exception as error:
        # The reader raises whatever it comes upon.
        raise ValueError(f"the GBNF grammar cannot be read: {error}") from None


def make_tokenizer(vocabulary: Vocabulary, vocab_size: int, eos_token_ids: Collection[int]) -> LLTokenizer:
    """The vocabulary as llguidance searches it.

    Args:
        vocab_size: Width of the model's logits. Ids without a token are never allowed.
        eos_token_ids: What may come where a form can end. A model without any gets one beyond its vocabulary.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    padding = [b""] * (vocab_size - len(vocabulary.tokens))
    end_ids = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size)
    wrapper = TokenizerWrapper(
        _Tokens(
            tokens=[*vocabulary.tokens[:vocab_size], *padding, *([] if end_ids else [b"<end>"])],
            special_token_ids=[
                token_id for token_id in vocabulary.special_token_ids if token_id < vocab_size
            ],
            eos_token_id=end_ids[0] if end_ids else vocab_size,
        )
    )
    return LLTokenizer(wrapper, n_vocab=len(wrapper.tokens), eos_token=end_ids or [vocab_size])


@dataclass(slots=True)
class _Tokens:
    """What `TokenizerWrapper` reads."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: Any) -> list[int]:
        raise NotImplementedError("forms are matched without cutting text into tokens")


class Grammar:
    """The form of one sequence, as far as its tokens have come.

    Attributes:
        mask: Of the next token; an error if the form cannot go on.
    """

    def __init__(self, grammars: Grammars, structured: StructuredOutputs, token_ids: Sequence[int]) -> None:
        self._grammars = grammars
        self._matcher: LLMatcher
        self.mask: Future[Bitmask] = grammars.submit(self._begin, structured, list(token_ids))

    @property
    def has_mask(self) -> bool:
        """Whether the mask is there. What this says may change between two calls, as long as it has said no."""
        return self.mask.done() and self.mask.exception() is None

    @property
    def error(self) -> BaseException | None:
        """Why there will be no mask; None where it is there or on its way."""
        return self.mask.exception() if self.mask.done() else None

    def advance(self, token_id: int) -> bool:
        """Takes in the token that was drawn under `mask`; whether the form is complete, and nothing can follow.

        Raises:
            ValueError: The form has no place for it.
        """
        if not self._matcher.consume_token(token_id):
            raise ValueError(self._matcher.get_error())
        return self._matcher.is_stopped()

    def start_mask(self) -> None:
        """Has a thread fill the mask of the token after those that were taken in."""
        self.mask = self._grammars.submit(self._fill)

    def allowed_tokens(self, may_end: bool, among: Bitmask | None = None) -> bytes:
        """The mask that is there, as bytes.

        Args:
            may_end: Whether tokens that end the sequence are among them even where others are.
            among: What the request allows besides; None for everything.
        """
        mask = self.mask.result()
        if among is not None:
            mask = mask & among
        if not may_end:
            others = mask & ~self._grammars.end_mask
            mask = others if others.any() else mask
        return mask.tobytes()

    def _begin(self, structured: StructuredOutputs, token_ids: list[int]) -> Bitmask:
        self._matcher = self._grammars.match(structured)
        if token_ids and not self._matcher.consume_tokens(token_ids):
            raise ValueError(self._matcher.get_error())
        return self._fill()

    def _fill(self) -> Bitmask:
        mask = np.zeros(self._grammars.num_words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())
        return mask[: len(self._grammars.end_mask)]


@dataclass(slots=True)
class _Compiled:
    """A form on its way; whoever needs it first compiles it under the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    matcher: LLMatcher | None = None


class Grammars:
    """Compiles forms, and fills masks in threads that are there once they are needed.

    Args:
        vocab_size: Width of the model's logits.

    Attributes:
        vocabulary: Must be set before the first form.
        end_mask: The tokens that end a sequence.
        num_words: Length of the masks that llguidance fills.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self.vocabulary: Vocabulary | None = None
        self.vocab_size, self._eos_token_ids = vocab_size, eos_token_ids
        self.end_mask: Bitmask = bitmask_of(eos_token_ids, vocab_size)
        # One more for the end token of a model that has none.
        self.num_words = -(-(vocab_size + (not self.end_mask.any())) // 32)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutputs, _Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def start(self, structured: StructuredOutputs, token_ids: Sequence[int]) -> Grammar:
        """A form of a sequence that has these tokens after its prompt; a thread compiles it."""
        return Grammar(self, structured, token_ids)

    def submit(self, function: Any, *arguments: Any) -> Future[Bitmask]:
        """Has a thread call a function."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="grammars")
        return self._threads.submit(function, *arguments)

    def match(self, structured: StructuredOutputs) -> LLMatcher:
        """A matcher at a form's start; for threads.

        Raises:
            ValueError: The form cannot be compiled.
        """
        from llguidance import LLMatcher

        with self._lock:
            compiled = self._compiled.setdefault(structured, _Compiled())
            self._compiled.move_to_end(structured)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        with compiled.lock:
            if compiled.matcher is None:
                matcher = LLMatcher(
                    self._learn(), _HEADER + lark_of(structured), log_level=0, limits=limits()
                )
                if matcher.is_error():
                    raise ValueError(matcher.get_error())
                compiled.matcher = matcher
            return compiled.matcher.deep_copy()

    def close(self) -> None:
        """Ends the threads. May be called twice."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _learn(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                if self.vocabulary is None:
                    raise ValueError("the engine does not know its tokenizer's vocabulary")
                self._tokenizer = make_tokenizer(self.vocabulary, self.vocab_size, self._eos_token_ids)
            return self._tokenizer
