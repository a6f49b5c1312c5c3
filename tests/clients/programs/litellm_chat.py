"""litellm: OpenAI's API, plain and streamed; Anthropic's; and its bridge from Anthropic's to OpenAI's."""

from __future__ import annotations

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask for a newer one

import litellm

url, key = sys.argv[1:]
base = url.removesuffix("/v1")
messages = [{"role": "user", "content": "Name a colour."}]
# The bridge goes through responses, and asks for 16 tokens at least, as OpenAI does.
asked = {"messages": messages, "api_key": key, "max_tokens": 16, "temperature": 0, "num_retries": 0}
tool = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
choice = {"type": "function", "function": {"name": "paint"}}


def text_of(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


async def bridged() -> tuple[str, str]:
    """Anthropic's messages, which litellm makes OpenAI's of: whole, and from the events of a stream."""
    options = {"model": "openai/llama", "api_base": url, **asked}
    whole = await litellm.anthropic.messages.acreate(**options)
    said = ""
    data = b""
    async for piece in await litellm.anthropic.messages.acreate(**options, stream=True):
        data += piece if isinstance(piece, bytes) else b""
    for line in data.decode().splitlines():
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            said += event.get("delta", {}).get("text", "") if event["type"] == "content_block_delta" else ""
    return whole["content"][0]["text"], said


openai = {"model": "openai/llama", "api_base": url, **asked}
anthropic = {"model": "anthropic/llama", "api_base": base, **asked}
whole, streamed = asyncio.run(bridged())
called = litellm.completion(**{**openai, "max_tokens": 60}, tools=[tool], tool_choice=choice)
print(
    json.dumps(
        {
            "openai": litellm.completion(**openai).choices[0].message.content,
            "openai streamed": text_of(litellm.completion(**openai, stream=True)),
            "anthropic": litellm.completion(**anthropic).choices[0].message.content,
            "anthropic streamed": text_of(litellm.completion(**anthropic, stream=True)),
            "bridged": whole,
            "bridged streamed": streamed,
            "text": litellm.text_completion(
                model="text-completion-openai/llama",
                prompt="Red, green,",
                api_base=url,
                api_key=key,
                max_tokens=4,
                temperature=0,
            )
            .choices[0]
            .text,
            "called": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
        }
    )
)
