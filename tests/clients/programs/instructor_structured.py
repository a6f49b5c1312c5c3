"""instructor: objects by JSON_SCHEMA, and by JSON, where the schema is in the prompt alone."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Event(BaseModel):
    """A meeting."""

    name: str = Field(max_length=20)
    day: Literal["Monday", "Sunday"]
    guests: list[Literal["Ann", "Bob", "Zoë"]] = Field(max_length=3)


class Anything(BaseModel, extra="allow"):
    """What every JSON object is: the model is too small to follow a schema by itself."""


url, key = sys.argv[1:]
client = OpenAI(base_url=url, api_key=key, max_retries=0)


def ask(mode: instructor.Mode, kind: type[BaseModel], **arguments: Any) -> dict[str, Any]:
    patched = instructor.from_openai(client, mode=mode)
    messages = [{"role": "user", "content": "Ann and Bob meet on Monday for lunch."}]
    answer = patched.chat.completions.create(
        model="llama", messages=messages, response_model=kind, max_tokens=300, max_retries=0, **arguments
    )
    return answer.model_dump()


modes = instructor.Mode
by_schema = ask(modes.JSON_SCHEMA, Event, temperature=0)
# Any JSON object may be long: with this seed it is not.
by_words = ask(modes.JSON, Anything, temperature=0.5, seed=0)
print(json.dumps({"schema": by_schema, "any": by_words}))
