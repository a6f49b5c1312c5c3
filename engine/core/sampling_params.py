"""SamplingParams: how a request's tokens are chosen and when it stops, validated on construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from engine.core.limits import MAX_LOGPROBS, MAX_SAMPLES, limit_of
from engine.core.structured_outputs import StructuredOutputs
from engine.errors import RequestError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Some numbers.

    Attributes:
        low: The least of them.
        high: The largest; None: there is none.
    """

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        # The comparisons are written so that NaN fails them.
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high is None else f"between {self.low} and {self.high}"


@dataclass(frozen=True, slots=True)
class Parameter:
    """What is known of a field of `SamplingParams` besides its meaning.

    Attributes:
        kind: Its type, as annotated.
        limits: What it may be; None: no number, or any.
        is_recommended: Whether a model's generation_config.json may recommend it.
        example: A value that changes a draw, for the steps that try all code; None: it has no part in a draw, or goes
            the way of another.
    """

    name: str
    kind: Any
    limits: Range | None = None
    is_recommended: bool = False
    example: Any = None

    def read(self, value: Any) -> Any:
        """The value as its own type: numpy's numbers are such, too.

        Raises:
            RequestError: It is of another type, or out of range.
        """
        kind, is_optional = _scalar(self.kind)
        if value is None and is_optional:
            return None
        # True is an int to Python, and nobody's number of tokens.
        if type(value) is not kind and (not isinstance(value, _ABSTRACT[kind]) or isinstance(value, bool)):
            raise RequestError(f"{self.name} must be {_WORDS[kind]}, got {value!r}", self.name)
        if self.limits is not None and kind(value) not in self.limits:
            raise RequestError(f"{self.name} must be {self.limits}, got {value}", self.name)
        return kind(value)

    @property
    def is_scalar(self) -> bool:
        """Whether it is one number or flag."""
        return _scalar(self.kind)[0] in _WORDS


_WORDS: dict[type, str] = {bool: "True or False", int: "an integer", float: "a number"}
"""How the types of scalar parameters are called."""

_ABSTRACT: dict[type, type] = {bool: bool, int: Integral, float: Real}
"""What of other libraries is taken for them."""


@cache
def _scalar(annotation: Any) -> tuple[Any, bool]:
    """The type of a parameter, the first that is no None, and whether it may be None."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next(kind for kind in kinds if kind is not NoneType), NoneType in kinds


def _strings(value: Any, name: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else _elements(value, name, "strings")
    if any(not isinstance(text, str) or not text for text in texts):
        raise RequestError(f"{name} must hold non-empty strings", name)
    most = limit_of(f"{name}[]").most
    longest = max(map(len, texts), default=0)
    if longest > most:
        raise RequestError(f"{name} takes strings of at most {most} characters, got one of {longest}", name)
    return texts


def _ids(value: Any, name: str) -> tuple[int, ...]:
    ids = _elements(value, name, "token ids")
    if set(map(type, ids)) <= {int}:
        return ids
    if any(not isinstance(token_id, Integral) or isinstance(token_id, bool) for token_id in ids):
        raise RequestError(f"{name} must hold token ids, got {value!r}", name)
    return tuple(map(int, ids))


def _optional_ids(value: Any, name: str) -> tuple[int, ...] | None:
    return None if value is None else _ids(value, name)


def _elements(value: Any, name: str, wanted: str) -> tuple[Any, ...]:
    """None, or what can be iterated over, but text."""
    if value is None:
        return ()
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must hold {wanted}, got {value!r}", name)
    elements = tuple(value)
    _check_size(len(elements), name)
    return elements


def _check_size(number: int, name: str) -> None:
    limit = limit_of(name)
    if number > limit.most:
        raise RequestError(f"{name} takes at most {limit.most} {limit.unit}, got {number}", name)


def _biases(value: Any, name: str) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be a dictionary of numbers by token id, got {value!r}", name)
    _check_size(len(value), name)
    for token_id, bias in value.items():
        if not isinstance(token_id, Integral) or not isinstance(bias, Real) or isinstance(bias, bool):
            raise RequestError(f"{name} must hold numbers by token id, got {bias!r} for {token_id!r}", name)
    return {int(token_id): float(bias) for token_id, bias in value.items()}


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "stop": _strings,
    "stop_token_ids": _ids,
    "logit_bias": _biases,
    "allowed_token_ids": _optional_ids,
    "bad_words": _strings,
}
"""What makes the one form of fields that users write in several."""


def _parameter(default: Any, limits: Range, *, is_recommended: bool = False, example: Any = None) -> Any:
    """A field that is a number; the other arguments are those of `Parameter`."""
    metadata = {"limits": limits, "is_recommended": is_recommended, "example": example}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request. Names and ranges are OpenAI's, extended by vLLM's.

    Each parameter is declared here once, with what other modules have to know of it; see `SAMPLING_PARAMETERS`.

    Attributes:
        n: Samples drawn from the prompt; they share its cache blocks.
        max_tokens: Most tokens to generate; None means up to the model's context, 0 that only the prompt's
            log-probabilities are wanted.
        min_tokens: No end-of-sequence or stop token before this many.
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens whose probabilities sum to at least this; 0 is greedy.
        min_p: Drop tokens below this fraction of the likeliest one's probability.
        repetition_penalty: Divides (multiplies) positive (negative) logits of tokens seen in prompt or output.
        presence_penalty: Subtracted once from the logit of each token in the output.
        frequency_penalty: Subtracted from a logit for each occurrence of its token in the output.
        seed: Fixes the draw; a request without one gets a random one at arrival.
        stop: Strings that end the output; the match itself is cut off.
        stop_token_ids: Token ids that end the output.
        ignore_eos: Go on after an end-of-sequence token.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the matched stop string at the end of the text.
        logit_bias: Added to the logits, by token id, -100..100.
        allowed_token_ids: The only tokens that may be drawn, the end among them only if it is named; None for all.
        bad_words: Strings whose tokens the output never has in a row: as the tokenizer writes each at the start of a
            text and after a space, its last token is banned where the others stand before it.
        logprobs: Log-probabilities of the chosen token and of this many likeliest ones; None for none.
        prompt_logprobs: Log-probabilities of the prompt's own tokens and of this many likeliest ones in the place of
            each; None for none.
        structured_outputs: The form that the output must have, also as a dictionary with its fields; None for any.
    """

    n: int = _parameter(1, Range(low=1, high=MAX_SAMPLES))
    max_tokens: int | None = _parameter(16, Range(low=0))
    min_tokens: int = _parameter(0, Range(low=0))
    temperature: float = _parameter(1.0, Range(low=0.0, high=2.0), is_recommended=True)
    top_k: int = _parameter(0, Range(low=0), is_recommended=True, example=40)
    top_p: float = _parameter(1.0, Range(low=0, high=1), is_recommended=True, example=0.9)
    min_p: float = _parameter(0.0, Range(low=0.0, high=1.0), is_recommended=True, example=0.01)
    repetition_penalty: float = _parameter(1.0, Range(low=0.01, high=10), is_recommended=True, example=1.2)
    presence_penalty: float = _parameter(0.0, Range(low=-2.0, high=2.0))
    frequency_penalty: float = _parameter(0.0, Range(low=-2.0, high=2.0), example=0.5)
    seed: int | None = _parameter(None, Range(low=-MAX_SEED - 1, high=MAX_SEED))
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = _parameter(None, Range(low=0, high=MAX_LOGPROBS))
    prompt_logprobs: int | None = _parameter(None, Range(low=0, high=MAX_LOGPROBS))
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        # A user may write stop="\n", stop=["\n"] or top_k=-1; the fields hold one form, and no list of the user's.
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        # Each request makes several of these, in which most values are defaults.
        for parameter in _SCALARS:
            value = getattr(self, parameter.name)
            if value is not _DEFAULTS[parameter.name]:
                object.__setattr__(self, parameter.name, parameter.read(value))
        for name, read in _READERS.items():
            value = getattr(self, name)
            if value is not _DEFAULTS[name]:
                object.__setattr__(self, name, read(value, name))
        if self.structured_outputs is not None:
            structured = StructuredOutputs.read(self.structured_outputs)
            object.__setattr__(self, "structured_outputs", structured)
        if self.allowed_token_ids == ():
            raise RequestError("allowed_token_ids must hold at least one token id", "allowed_token_ids")
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias must lie between -100 and 100, got {bias} for token {token_id}", "logit_bias"
                )
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise RequestError(
                "max_tokens must be at least 1, got 0, which only prompt_logprobs allow", "max_tokens"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )

    @property
    def is_greedy(self) -> bool:
        # Below this a float32 quotient can overflow, and the likeliest token is all that could be drawn.
        return self.temperature < 1e-5 or self.top_p == 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


_KINDS = get_type_hints(SamplingParams)

SAMPLING_PARAMETERS = tuple(
    Parameter(option.name, _KINDS[option.name], **option.metadata) for option in fields(SamplingParams)
)
"""The fields of `SamplingParams`, in order: the one list of them."""

_SCALARS = tuple(parameter for parameter in SAMPLING_PARAMETERS if parameter.is_scalar)

_DEFAULTS = {option.name: option.default for option in fields(SamplingParams)}

EXAMPLES = {
    parameter.name: parameter.example for parameter in SAMPLING_PARAMETERS if parameter.example is not None
}
"""By name, values under which a draw reaches all code."""
