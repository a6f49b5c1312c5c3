"""LlamaIndex: structured prediction through a function, and a function that is called."""

import json
import sys
from typing import Literal

from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"Rain in {city}."


url, key = sys.argv[1:]
model = OpenAILike(
    api_base=url,
    api_key=key,
    model="llama",
    temperature=0,
    max_tokens=80,
    max_retries=0,
    context_window=8192,
    is_chat_model=True,
    is_function_calling_model=True,
)
predicted = model.structured_predict(
    Weather, PromptTemplate("How is the weather in {city} tomorrow?"), city="Paris"
)
tool = FunctionTool.from_defaults(fn=get_weather)
said = model.chat_with_tools([tool], "How is the weather in Paris?", tool_required=True)
[call] = model.get_tool_calls_from_response(said)
print(json.dumps({"predicted": predicted.model_dump(), "called": call.tool_kwargs}))
