"""Bodies that are valid, and what becomes of them when something in them is another."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_FUNCTION = {"name": "weather", "description": "The weather", "parameters": _PARAMETERS}
_TOOLS = [{"type": "function", "function": _FUNCTION}]
_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "x"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "mild"},
    {"role": "user", "content": "and now?"},
]
_SAMPLING: dict[str, Any] = {
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "n": 2,
    "seed": 1,
    "stop": ["x"],
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1},
    "min_tokens": 1,
    "stop_token_ids": [7],
    "bad_words": ["bad"],
    "allowed_token_ids": [1, 2, 97],
    "ignore_eos": True,
    "skip_special_tokens": True,
    "priority": 0,
    "cache_salt": "salt",
    "request_id": "one",
    "user": "someone",
    "metadata": {"a": "b"},
    "return_token_ids": True,
}

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "scripted", "prompt": "hello", "logprobs": 2, "echo": True, **_SAMPLING},
    "/v1/chat/completions": {
        "model": "scripted",
        "messages": [_MESSAGES[0], _MESSAGES[4]],
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"a": 1},
        **_SAMPLING,
    },
    "/v1/embeddings": {"model": "scripted", "input": ["a", "b"], "encoding_format": "float"},
    "/v1/responses": {
        "model": "scripted",
        "instructions": "Be brief.",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "max_output_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "store": True,
        "metadata": {"a": "b"},
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "include": [],
        "parallel_tool_calls": True,
    },
    "/v1/messages": {
        "model": "scripted",
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_tokens": 4,
        "temperature": 0.5,
        "top_k": 5,
        "stop_sequences": ["x"],
        "metadata": {"user_id": "someone"},
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hello"}]},
    "/tokenize": {
        "model": "scripted",
        "messages": _MESSAGES[:2],
        "tools": [{"type": "function", "function": _FUNCTION}],
    },
    "/detokenize": {"tokens": [1, 2]},
    "/apply-template": {"messages": _MESSAGES, "tools": _TOOLS},
}
"""By path. An engine that a script stands for has no vocabulary for forms; theirs are tested elsewhere."""

# Wrong for every field that has a number, a text, a list or an object, as none of these has.
_NEVER = [[[[]]], [{"a": [{}]}]]
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *("", " ", "\x00", "x" * 3000, "\ud800", "é\u0301\u202e", "none", "auto", "1", "{}", "data:,x"),
    *([], [None], [[]], [1, "a"], list(range(300)), {}, {"": None}, {"type": "x"}, {"type": None}),
]
_UNKNOWN = "temprature_"


@dataclass(frozen=True, slots=True)
class Mutant:
    """A body that is another one's descendant.

    Attributes:
        field: What must be named, if the body is invalid by construction: a field, or nothing ("") where no field is
            at fault; None where it may be valid still.
    """

    path: str
    body: bytes
    field: str | None


def mutants(number: int, seed: int) -> Iterator[Mutant]:
    """As many bodies, each changed in one place or in several."""
    chance = random.Random(seed)
    paths = sorted(BODIES)
    for index in range(number):
        path = paths[index % len(paths)]
        yield chance.choice(_CHANGES)(chance, path, copy.deepcopy(BODIES[path]))


def _encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def _with_a_wrong_type(chance: random.Random, path: str, body: dict[str, Any]) -> Mutant:
    # What has no effect may be anything, and some may be lists of lists.
    fields = [name for name in body if name not in ("metadata", "user", "prompt", "input")]
    field = chance.choice(fields)
    body[field] = chance.choice(_NEVER)
    return Mutant(path, _encoded(body), field)


def _with_an_unknown_field(chance: random.Random, path: str, body: dict[str, Any]) -> Mutant:
    # Null is not given; half a pair of surrogates is no JSON.
    body[_UNKNOWN] = chance.choice([value for value in _VALUES if value not in (None, "\ud800")])
    # Clients of these two get fields monthly, which are counted and said.
    takes_all = path.startswith(("/v1/responses", "/v1/messages"))
    return Mutant(path, _encoded(body), None if takes_all else _UNKNOWN)


def _cut_off(chance: random.Random, path: str, body: dict[str, Any]) -> Mutant:
    data = _encoded(body)
    return Mutant(path, data[: chance.randrange(len(data))], "")


def _with_other_bytes(chance: random.Random, path: str, body: dict[str, Any]) -> Mutant:
    data = bytearray(_encoded(body))
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return Mutant(path, bytes(data), None)


def _with_other_values(chance: random.Random, path: str, body: dict[str, Any]) -> Mutant:
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(list(_places(body)))
        if chance.random() < 0.2:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(chance.choice(_VALUES))
        if not body:
            break
    return Mutant(path, _encoded(body), None)


def _nested(chance: random.Random, path: str, body: dict[str, Any]) -> Mutant:
    depth = chance.choice([10, 100, 1000, 100_000])
    value = b"[" * depth + b"]" * depth if chance.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
    body[chance.choice(list(body))] = "HERE"
    return Mutant(path, _encoded(body).replace(b'"HERE"', value), None)


def _that_is_no_object(chance: random.Random, path: str, body: dict[str, Any]) -> Mutant:
    return Mutant(
        path, _encoded(chance.choice([value for value in _VALUES if not isinstance(value, dict)])), ""
    )


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every member of objects and lists, as what holds it and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


_CHANGES = [
    _with_a_wrong_type,
    _with_an_unknown_field,
    _cut_off,
    _with_other_bytes,
    *[_with_other_values] * 4,
    _nested,
    _that_is_no_object,
]
