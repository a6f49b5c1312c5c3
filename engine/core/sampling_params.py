"""SamplingParams: how a request's tokens are chosen and when it stops, validated on construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.errors import RequestError

MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request. Names and ranges are OpenAI's, extended by vLLM's.

    Attributes:
        n: Samples drawn from the prompt; they share its cache blocks.
        max_tokens: Most tokens to generate; None means up to the model's context.
        min_tokens: No end-of-sequence or stop token before this many.
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens whose probabilities sum to at least this.
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
        logprobs: Log-probabilities of the chosen token and of this many likeliest ones; None for none.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # A user may write stop="\n", stop=["\n"] or top_k=-1; the fields hold one form.
        stop: Any = self.stop
        if stop is None or isinstance(stop, str):
            object.__setattr__(self, "stop", () if stop is None else (stop,))
        elif isinstance(stop, list):
            object.__setattr__(self, "stop", tuple(stop))
        if isinstance(self.stop_token_ids, list):
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_range("n", 1, MAX_SAMPLES)
        if self.max_tokens is not None:
            self._check_range("max_tokens", 1)
        self._check_range("min_tokens", 0)
        self._check_range("temperature", 0.0, 2.0)
        self._check_range("top_k", 0)
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p must be greater than 0 and at most 1, got {self.top_p}", "top_p")
        self._check_range("min_p", 0.0, 1.0)
        if not 0.0 < self.repetition_penalty <= 10.0:
            raise RequestError(
                f"repetition_penalty must be greater than 0 and at most 10, got {self.repetition_penalty}",
                "repetition_penalty",
            )
        self._check_range("presence_penalty", -2.0, 2.0)
        self._check_range("frequency_penalty", -2.0, 2.0)
        if self.seed is not None:
            self._check_range("seed", -MAX_SEED - 1, MAX_SEED)
        if self.logprobs is not None:
            self._check_range("logprobs", 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", "stop")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError("stop must hold non-empty strings", "stop")
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias must lie between -100 and 100, got {bias} for token {token_id}", "logit_bias"
                )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )

    def _check_range(self, field: str, low: float, high: float | None = None) -> None:
        value = getattr(self, field)
        # The comparison is written so that NaN fails it.
        if not (value >= low and (high is None or value <= high)):
            limit = f"at least {low}" if high is None else f"between {low} and {high}"
            raise RequestError(f"{field} must be {limit}, got {value}", field)

    @property
    def is_greedy(self) -> bool:
        # Below this a float32 quotient can overflow, and the likeliest token is all that could be drawn.
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
