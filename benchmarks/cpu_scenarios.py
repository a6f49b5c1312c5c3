"""What the comparison on a CPU sends: the scenarios, which are data, and texts of an exact number of tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.prompts import WORDS
from benchmarks.scenarios import PlannedRequest
from engine.errors import EngineError
from engine.tokenizer.tokenizer import Tokenizer

# Each server draws from the same distribution: filters that some have by default are off where they are not named.
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.0}
PENALIZED = {"temperature": 0.8, "top_k": 40, "min_p": 0.0, "repetition_penalty": 1.1}

_SHORTER = 16


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests that are all sent at once.

    Attributes:
        metric: The reported field of benchmarks.metrics.Summary.
        note: What is special, for the table.
        fields: Of the requests, beside the prompt and `max_tokens`; greedy if they name no temperature.
        is_warm: Whether the prompts are sent once before, for a token each that is not counted, so that the prefix
            cache has them and the time is that of decoding.
        hogs: Programs that compute beside, each as much as one processor can.
        niceness: Of those.
    """

    metric: str
    unit: str
    streams: int
    own_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    note: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_warm: bool = False
    hogs: int = 0
    niceness: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each prompt."""
        return self.shared_tokens + self.own_tokens

    @property
    def title(self) -> str:
        """Its sizes and what is special."""
        shared = f"{self.shared_tokens} shared + " if self.shared_tokens else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.streams} x {shared}{self.own_tokens} in, {self.output_tokens} out{note}"

    def shortened(self) -> Scenario:
        """The same with a sixteenth of the tokens, to try a command out."""
        return replace(
            self,
            own_tokens=max(2, self.own_tokens // _SHORTER),
            output_tokens=-(-self.output_tokens // _SHORTER),
            shared_tokens=self.shared_tokens // _SHORTER,
        )


def _decode(streams: int, own_tokens: int, output_tokens: int, note: str, **others: Any) -> Scenario:
    metric = "decode_tokens_per_second" if streams == 1 else "output_tokens_per_second"
    return Scenario(metric, "tok/s", streams, own_tokens, output_tokens, note=note, is_warm=True, **others)


def _output(streams: int, own_tokens: int, note: str = "", **others: Any) -> Scenario:
    return Scenario("output_tokens_per_second", "tok/s", streams, own_tokens, 128, note=note, **others)


def _prefill(own_tokens: int) -> Scenario:
    return Scenario("prefill_tokens_per_second", "tok/s", 1, own_tokens, 1, note="prefill")


SCENARIOS = {
    "A": _decode(1, 128, 128, "decode"),
    "B": _output(8, 128),
    "C": _output(32, 256),
    "D": _prefill(1024),
    "E": Scenario("duration", "s", 32, 32, 32, shared_tokens=512),
    "sampled-1": _decode(1, 128, 128, "decode, sampled", fields=SAMPLED),
    "sampled-8": _output(8, 128, "sampled", fields=SAMPLED),
    "sampled-32": _output(32, 256, "sampled", fields=SAMPLED),
    "penalties-8": _output(8, 128, "top_k 40, penalty", fields=PENALIZED),
    "logprobs-8": _output(8, 128, "logprobs 5", fields={"logprobs": 5}),
    "prefill-8k": _prefill(8000),
    "decode-8k": _decode(1, 8000, 128, "decode"),
    "decode-8x4k": _decode(8, 4000, 128, "decode"),
    "busy": _decode(1, 128, 128, "decode, 2 busy programs", hogs=2),
    "busy-nice": _decode(1, 128, 128, "decode, 2 nice programs", hogs=2, niceness=10),
    "busy-8": _decode(1, 128, 128, "decode, 8 busy programs", hogs=8),
    "busy-sampled": _decode(1, 128, 128, "decode, sampled, 2 busy programs", hogs=2, fields=SAMPLED),
}
"""By name; the first five are what people compare, the others what they run."""

DEFAULT_SCENARIOS = ("A", "B", "C", "D", "E")


class ExactPrompts:
    """Random texts of an exact number of tokens, no two of which begin alike.

    Each word is one token of `tokenizer` wherever it stands. Servers with the same vocabulary get the same text.
    """

    def __init__(self, tokenizer: Tokenizer, seed: str) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._num_added = len(tokenizer.encode(""))  # BOS, where the model has one
        self._words = [word for word in WORDS if self._size(word) == 1 and self._size(f"{word} {word}") == 2]
        self._warm: dict[str, list[PlannedRequest]] = {}

    def _size(self, text: str) -> int:
        return len(self._tokenizer.encode(text)) - self._num_added

    def make(self, num_tokens: int, prefix: str = "") -> str:
        """A text of `num_tokens` tokens, BOS included, that begins with `prefix`, itself made here."""
        start = [prefix] if prefix else []
        num_words = num_tokens - self._num_added - self._size(prefix)
        text = " ".join(start + self._random.choices(self._words, k=num_words))
        if (size := self._size(text) + self._num_added) != num_tokens:
            raise EngineError(f"words of one token each made {size} tokens, not {num_tokens}")
        return text

    def requests(self, scenario: Scenario) -> list[PlannedRequest]:
        """One run's: fresh ones, but the same at every call where the prefix cache is to have them."""
        if scenario.title in self._warm:
            return self._warm[scenario.title]
        shared = self.make(scenario.shared_tokens) if scenario.shared_tokens else ""
        texts = [self.make(scenario.prompt_tokens, shared) for _ in range(scenario.streams)]
        requests = [PlannedRequest(text, scenario.output_tokens, fields=scenario.fields) for text in texts]
        if scenario.is_warm:
            self._warm[scenario.title] = requests
        return requests
