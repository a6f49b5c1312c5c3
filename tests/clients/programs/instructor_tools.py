"""instructor in the mode TOOLS, whole and as a partial stream."""

from __future__ import annotations

import json
import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


url, key = sys.argv[1:]
client = instructor.from_openai(openai.OpenAI(base_url=url, api_key=key), mode=instructor.Mode.TOOLS)
arguments = {
    "model": "llama",
    "temperature": 0,
    "max_tokens": 80,
    "max_retries": 0,
    "messages": [{"role": "user", "content": "How is the weather in Paris tomorrow?"}],
}
whole = client.chat.completions.create(response_model=Weather, **arguments)
*_, last = client.chat.completions.create_partial(response_model=Weather, **arguments)
print(json.dumps({"whole": whole.model_dump(), "streamed": last.model_dump()}))
