"""Grammars: which tokens the form of an answer allows next. llguidance matches; its work is done in threads.

    update: tokens are appended ─► advance ─► a thread fills the next masks │ meanwhile plan, forward pass ─► draws

Matcher and mask are a function of the form and the sequence's tokens so far, whatever the steps were. Matching holds
no GIL, so that a mask is made while the model computes. The package is imported with the first form: a start does not
wait for it.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from engine.core.bans import Bitmask, bitmask_of
from engine.core.matcher import Matcher, TokenTrie, Vocabulary
from engine.core.structured_outputs import StructuredOutputs

MAX_COMPILED = 256
"""Compiled forms that are kept for requests to come."""

MASKS_A_TASK = 8
"""Rows whose masks one thread fills: few threads take cores from the step, and the masks of a large batch do not
queue behind each other."""

_HEADER = '%llguidance {"no_forcing": true}\n'
"""Every way to cut a forced text into tokens is allowed: the model chooses, and no tokenizer is asked for one."""

Result = TypeVar("Result")


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


@dataclass(frozen=True, slots=True)
class Mask:
    """Which tokens may come next, as bitmasks' bytes.

    Attributes:
        allowed: All.
        not_ends: Those that do not end the sequence; all where there are no others.
    """

    allowed: bytes
    not_ends: bytes


class Grammar:
    """The form of one sequence, as far as its tokens have come.

    Attributes:
        mask: Of the next token; an error if the form cannot go on.
    """

    def __init__(self, grammars: Grammars, structured: StructuredOutputs, token_ids: Sequence[int]) -> None:
        self._grammars = grammars
        self._matcher: Matcher
        self.mask: Future[Mask] = grammars.submit(self._begin, structured, list(token_ids))

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
        return self._matcher.consume(token_id)

    def fill_mask(self) -> None:
        """Completes `mask`; for threads."""
        try:
            self.mask.set_result(self._fill())
        except Exception as error:
            self.mask.set_exception(error)

    def allowed_tokens(self, may_end: bool, among: Bitmask | None = None) -> bytes:
        """The mask that is there, as bytes.

        Args:
            may_end: Whether tokens that end the sequence are among them even where others are.
            among: What the request allows besides; None for everything.
        """
        mask = self.mask.result()
        if among is not None:
            mask = self._mask_of(np.frombuffer(mask.allowed, np.int32) & among)
        return mask.allowed if may_end else mask.not_ends

    def _begin(self, structured: StructuredOutputs, token_ids: list[int]) -> Mask:
        self._matcher = self._grammars.match(structured)
        self._matcher.consume_all(token_ids)
        return self._fill()

    def _fill(self) -> Mask:
        mask = np.empty(self._grammars.num_words, np.int32)
        self._matcher.fill(mask)
        return self._mask_of(mask[: len(self._grammars.end_mask)])

    def _mask_of(self, bits: Bitmask) -> Mask:
        others = bits & ~self._grammars.end_mask
        allowed = bits.tobytes()
        return Mask(allowed, others.tobytes() if others.any() else allowed)


@dataclass(slots=True)
class _Compiled:
    """A form on its way; whoever needs it first compiles it under the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    matcher: Matcher | None = None


class Grammars:
    """Compiles forms, and fills masks in threads that are there once they are needed.

    Args:
        vocab_size: Width of the model's logits.

    Attributes:
        vocabulary: Must be set before the first form.
        end_mask: The tokens that end a sequence: [ceil(vocabulary / 32)] int32, bit t % 32 of word t // 32 token t's.
        num_words: Length of the masks that llguidance fills.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self.vocabulary: Vocabulary | None = None
        self.vocab_size, self._eos_token_ids = vocab_size, eos_token_ids
        self.end_mask: Bitmask = bitmask_of(eos_token_ids, vocab_size)
        # One more for the end token of a model that has none.
        self.num_words = -(-(vocab_size + (not self.end_mask.any())) // 32)
        self._trie: TokenTrie | None = None
        self._compiled: OrderedDict[StructuredOutputs, _Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def start(self, structured: StructuredOutputs, token_ids: Sequence[int]) -> Grammar:
        """A form of a sequence that has these tokens after its prompt; a thread compiles it."""
        return Grammar(self, structured, token_ids)

    def start_masks(self, grammars: Sequence[Grammar]) -> None:
        """Has threads fill the masks of the tokens after those that these have taken in."""
        for grammar in grammars:
            grammar.mask = Future()
        for start in range(0, len(grammars), MASKS_A_TASK):
            self.submit(_fill_masks, grammars[start : start + MASKS_A_TASK])

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Has a thread call a function."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="grammars")
        return self._threads.submit(function, *arguments)

    def match(self, structured: StructuredOutputs) -> Matcher:
        """A matcher at a form's start; for threads.

        Raises:
            ValueError: The form cannot be compiled.
        """
        with self._lock:
            compiled = self._compiled.setdefault(structured, _Compiled())
            self._compiled.move_to_end(structured)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        with compiled.lock:
            if compiled.matcher is None:
                compiled.matcher = Matcher(self._learn(), _HEADER + lark_of(structured))
            return compiled.matcher.copy()

    def close(self) -> None:
        """Ends the threads. May be called twice."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _learn(self) -> TokenTrie:
        with self._lock:
            if self._trie is None:
                if self.vocabulary is None:
                    raise ValueError("the engine does not know its tokenizer's vocabulary")
                self._trie = TokenTrie(self.vocabulary, self.vocab_size, self._eos_token_ids)
            return self._trie


def _fill_masks(grammars: Sequence[Grammar]) -> None:
    for grammar in grammars:
        grammar.fill_mask()
