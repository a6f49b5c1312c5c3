"""LlamaIndex: structured prediction by response_format."""

from __future__ import annotations

import json
import sys
from typing import Literal

from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Event(BaseModel):
    """A meeting."""

    name: str = Field(max_length=20)
    day: Literal["Monday", "Sunday"]
    guests: list[Literal["Ann", "Bob", "Zoë"]] = Field(max_length=3)


url, key = sys.argv[1:]
model = OpenAILike(
    model="llama",
    api_base=url,
    api_key=key,
    is_chat_model=True,
    should_use_structured_outputs=True,
    temperature=0,
    max_tokens=200,
    max_retries=0,
)
template = PromptTemplate("{who} meet on Monday for lunch.")
predicted = model.structured_predict(Event, template, who="Ann and Bob")
completed = model.as_structured_llm(Event).complete("Ann and Bob meet on Monday for lunch.").raw
print(json.dumps({"predicted": predicted.model_dump(), "completed": completed.model_dump()}))
