"""What clients ask for, and how they behave: one plan for an undisturbed run and for the one beside it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

Behaviour = Literal["patient", "slow", "leaves", "invalid"]
"""How a client reads: as it comes; with pauses; until it has enough; or not at all, as what it sends is refused."""

WORDS = (
    "the",
    "ship",
    "river",
    "stone",
    "light",
    "under",
    "seven",
    "old",
    "where",
    "north",
    "garden",
    "winter",
)

FORM = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 3}},
    "required": ["names"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 0.9, "top_p": 0.95}
# What must go on over a death, each in one kind or more; seeds are the requests' own.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "ignore_eos": True},
    {**SAMPLED, "ignore_eos": True},
    {**SAMPLED, "n": 3, "ignore_eos": True},
    {**SAMPLED, "logprobs": 3, "ignore_eos": True},
    {**SAMPLED, "stop": ["zq", "xk"], "min_tokens": 30},
    {**SAMPLED, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "ignore_eos": True},
    {**SAMPLED, "structured_outputs": {"json": FORM}},
    {"temperature": 0, "ignore_eos": True, "stream": False},
)
# The field is in the message, or it is no use to who sent it.
INVALID: tuple[tuple[str, Any], ...] = (
    ("temperature", -1),
    ("max_tokens", "many"),
    ("n", 0),
    ("logit_bias", {"x": 1}),
    ("stop", [7]),
    ("structured_outputs", {"json": {"type": "nothing"}}),
)


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to /v1/completions, and what its client does.

    Attributes:
        arrival: Seconds from the start of the run; later where too many are open.
        field: Of an invalid one, what is wrong.
        enough: Of one who leaves, how many events it waits for.
    """

    name: str
    body: dict[str, Any]
    arrival: float
    behaviour: Behaviour = "patient"
    field: str = ""
    enough: int = 0


def plan_requests(number: int, requests_per_second: float, seed: int, max_tokens: int = 120) -> list[Planned]:
    """Requests of all kinds with arrivals of a Poisson process, in bursts.

    Args:
        max_tokens: Of the longest answers; the shortest have a quarter.
    """
    chance = random.Random(seed)
    planned, now = [], 0.0
    for index in range(number):
        # Bursts: half of the requests come directly after another.
        now += 0.0 if chance.random() < 0.5 else chance.expovariate(requests_per_second / 2)
        body: dict[str, Any] = {
            "prompt": " ".join(chance.choices(WORDS, k=chance.randint(5, 200))),
            "max_tokens": chance.randint(max_tokens // 4, max_tokens),
            "seed": index,
            "stream": True,
            "return_token_ids": True,
            **KINDS[index % len(KINDS)],
        }
        if not body["stream"]:
            # Nobody sees how far it is, and a kill waits for its end: `tests.chaos.server.Killer`.
            body["max_tokens"] = max_tokens // 4
        name = f"request {index}"
        draw = chance.random()
        if draw < 0.08:
            field, value = chance.choice(INVALID)
            planned.append(Planned(name, body | {field: value}, now, "invalid", field))
        elif draw < 0.16 and body["stream"]:
            planned.append(Planned(name, body, now, "leaves", enough=chance.randint(1, 12)))
        else:
            planned.append(Planned(name, body, now, "slow" if draw < 0.24 else "patient"))
    return planned
