"""LangChain: with_structured_output by json_schema, plain and streamed, and by json_mode."""

from __future__ import annotations

import json
import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Event(BaseModel):
    """A meeting."""

    name: str = Field(max_length=20)
    day: Literal["Monday", "Sunday"]
    guests: list[Literal["Ann", "Bob", "Zoë"]] = Field(max_length=3)


url, key = sys.argv[1:]
model = ChatOpenAI(base_url=url, api_key=key, model="llama", temperature=0, max_tokens=200, max_retries=0)
question = "Ann and Bob meet on Monday for lunch."
by_schema = model.with_structured_output(Event, method="json_schema")
whole = by_schema.invoke(question)
streamed = list(by_schema.stream(question))[-1]
# A form alone does not make a small model come to an end.
repeat = 'Repeat this JSON: {"day": "Monday"}'
by_mode = model.with_structured_output(None, method="json_mode").invoke(repeat)
assert isinstance(whole, Event)
print(json.dumps({"whole": whole.model_dump(), "streamed": streamed.model_dump(), "any": by_mode}))
