"""OpenAI's client: `parse`, plain and streamed."""

from __future__ import annotations

import json
import sys
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, Field


class Event(BaseModel):
    """A meeting."""

    name: str = Field(max_length=20)
    day: Literal["Monday", "Sunday"]
    guests: list[Literal["Ann", "Bob", "Zoë"]] = Field(max_length=3)


url, key = sys.argv[1:]
completions = OpenAI(base_url=url, api_key=key, max_retries=0).chat.completions
arguments = {
    "model": "llama",
    "messages": [{"role": "user", "content": "Ann and Bob meet on Monday for lunch."}],
    "response_format": Event,
    "temperature": 0,
    "max_tokens": 200,
}
whole = completions.parse(**arguments).choices[0].message.parsed
with completions.stream(**arguments) as stream:
    for _ in stream:
        pass
    streamed = stream.get_final_completion().choices[0].message.parsed
print(json.dumps({"whole": whole.model_dump(), "streamed": streamed.model_dump()}))
