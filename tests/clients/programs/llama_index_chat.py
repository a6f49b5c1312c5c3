"""LlamaIndex: completions and chats, plain and streamed."""

from __future__ import annotations

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url, key = sys.argv[1:]
common = {
    "model": "llama",
    "api_base": url,
    "api_key": key,
    "temperature": 0,
    "max_tokens": 12,
    "max_retries": 0,
}
chats, completes = OpenAILike(**common, is_chat_model=True), OpenAILike(**common, is_chat_model=False)
messages = [ChatMessage(role="user", content="Name a colour.")]
print(
    json.dumps(
        {
            "chat": chats.chat(messages).message.content,
            "chat streamed": "".join(chunk.delta or "" for chunk in chats.stream_chat(messages)),
            "completion": completes.complete("Red, green,").text,
            "completion streamed": "".join(
                chunk.delta or "" for chunk in completes.stream_complete("Red, green,")
            ),
        }
    )
)
