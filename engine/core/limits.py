"""The most that a request may ask for: each limit once, and all of them in `LIMITS`, which docs/limits.md shows.

What is within them costs little, whoever asks for it; what is not is refused by name before anything is done.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_SAMPLES = 128
MAX_CHOICES = 2048
MAX_INPUTS = 2048
MAX_LOGPROBS = 20

MAX_STOP_STRINGS = 64
MAX_STOP_TOKEN_IDS = 1024
MAX_BIASES = 300
MAX_ALLOWED_TOKEN_IDS = 2**18
"""The largest vocabularies have so many: all of one may be allowed."""

MAX_BAD_WORDS = 64
MAX_STRING_CHARACTERS = 1024
"""A stop string or a bad word has at most so many."""

MAX_FORM_BYTES = 2**18
MAX_FORM_LEVELS = 64

MAX_TOOLS = 128
"""As many as OpenAI takes."""

MAX_TOOLS_BYTES = 2**18
"""So much is all of them together, as JSON."""

MAX_RENDERED_CHARACTERS = 2**24
MAX_RENDERING_SECONDS = 5.0
"""CPU time of its own thread: what others compute meanwhile does not count."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit in words, as docs/limits.md shows it.

    Attributes:
        field: Of a request, or a part of one: "stop[]" is each of those that "stop" holds.
        most: The largest number that is taken.
        unit: What is counted.
        note: What else there is to say.
    """

    field: str
    most: float
    unit: str
    note: str = ""


LIMITS = (
    Limit("n", MAX_SAMPLES, "samples", "; and no more than `--max-num-seqs`"),
    Limit("best_of", MAX_SAMPLES, "samples", "; and no more than `--max-num-seqs`"),
    Limit("prompt", MAX_CHOICES, "prompts of a completion", ", times `n` or `best_of`"),
    Limit("input", MAX_INPUTS, "prompts of embeddings"),
    Limit("logprobs", MAX_LOGPROBS, "likeliest tokens", "; `top_logprobs` and `prompt_logprobs`, too"),
    Limit("stop", MAX_STOP_STRINGS, "strings", "; `stop_sequences`, too"),
    Limit("stop[]", MAX_STRING_CHARACTERS, "characters"),
    Limit("stop_token_ids", MAX_STOP_TOKEN_IDS, "token ids"),
    Limit("logit_bias", MAX_BIASES, "tokens"),
    Limit("allowed_token_ids", MAX_ALLOWED_TOKEN_IDS, "token ids", "; all of a vocabulary may be named"),
    Limit("bad_words", MAX_BAD_WORDS, "strings"),
    Limit("bad_words[]", MAX_STRING_CHARACTERS, "characters"),
    Limit("structured_outputs", MAX_FORM_BYTES, "bytes of a form", ", by whatever field it is asked for"),
    Limit("structured_outputs.json", MAX_FORM_LEVELS, "levels"),
    Limit("tools", MAX_TOOLS, "tools", "; `functions`, too"),
    Limit("tools", MAX_TOOLS_BYTES, "bytes of all of them together", ", as JSON"),
    Limit("messages", MAX_RENDERED_CHARACTERS, "characters that the chat template writes"),
    Limit("messages", MAX_RENDERING_SECONDS, "seconds of CPU time that it takes"),
)


def limit_of(field: str) -> Limit:
    """The limit of a field that has one, and not two."""
    (limit,) = (limit for limit in LIMITS if limit.field == field)
    return limit
