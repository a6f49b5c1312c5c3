"""LangChain: bind_tools, plain and streamed, and with_structured_output by calling a function."""

from __future__ import annotations

import json
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


url, key = sys.argv[1:]
model = ChatOpenAI(base_url=url, api_key=key, model="llama", temperature=0, max_tokens=80, max_retries=0)
question = HumanMessage("How is the weather in Paris tomorrow?")
bound = model.bind_tools([Weather], tool_choice="Weather")
called = bound.invoke([question])
[call] = called.tool_calls
streamed = None
for chunk in bound.stream([question]):
    streamed = chunk if streamed is None else streamed + chunk
answer = model.bind_tools([Weather]).invoke(
    [question, called, ToolMessage("Rain.", tool_call_id=call["id"])], max_tokens=5
)
required = model.bind_tools([Weather], tool_choice="required", parallel_tool_calls=False).invoke([question])
structured = model.with_structured_output(Weather, method="function_calling").invoke([question])
print(
    json.dumps(
        {
            "bound": call["args"],
            "streamed": streamed.tool_calls[0]["args"],
            "required": required.tool_calls[0]["args"],
            "structured": structured.model_dump(),
            "is_answered": bool(answer.content) or bool(answer.tool_calls),
        }
    )
)
