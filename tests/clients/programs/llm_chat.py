"""llm, with a model of its extra-openai-models.yaml: plain, streamed, a conversation, and a schema."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

url, key = sys.argv[1:]
directory = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(directory)
os.environ["LLM_LOAD_PLUGINS"] = ""  # those that stand beside it want packages of their own
model = {
    "model_id": "ours",
    "model_name": "llama",
    "api_base": url,
    "api_key_name": "ours",
    "supports_schema": True,
    "supports_tools": True,
}
# JSON is YAML, too.
(directory / "extra-openai-models.yaml").write_text(json.dumps([model]))
(directory / "keys.json").write_text(json.dumps({"ours": key}))

import llm  # noqa: E402 - it reads the directory

ours = llm.get_model("ours")
options = {"temperature": 0, "max_tokens": 12}
conversation = ours.conversation()
first = conversation.prompt("Name a colour.", stream=False, **options).text()
second = conversation.prompt("And another?", stream=False, **options).text()
schema = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
formed = ours.prompt("Name a colour.", schema=schema, stream=False, temperature=0, max_tokens=40).text()
print(
    json.dumps(
        {
            "plain": first,
            "streamed": "".join(ours.prompt("Name a colour.", stream=True, **options)),
            "second": second,
            "formed": json.loads(formed),
        }
    )
)
