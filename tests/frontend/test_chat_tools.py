"""LLM.chat with tools: a random model calls what it must, in every format, alone and in company alike."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from engine import LLM, RequestOutput, SamplingParams
from engine.errors import RequestError
from engine.frontend.chat_format import ChatFormat
from engine.frontend.tool_formats import TOOL_FORMATS
from tests.helpers.chat_templates import MARKS, TEMPLATES, THINKS_AT_ONCE, byte_tokens, tokenizer_of
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

ASKED = {"role": "user", "content": "Weather?"}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Zürich"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "hourly": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("tools") / "model"
    config = copy.deepcopy(TINY_CONFIGS["llama"])
    config.max_position_embeddings = 4096
    config.eos_token_id = 256
    write_checkpoint(path, config)
    byte_tokens().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|eot|>", "chat_template": TEMPLATES["hermes"]})
    )
    with LLM(model=str(path), kv_cache_memory="32MiB", seed=1) as llm:
        yield llm


def chat(llm: LLM, name: str, params: list[SamplingParams], **options: Any) -> list[RequestOutput]:
    """Answers under a template of ours, which takes the place of the model's."""
    llm._chat_format = ChatFormat(tokenizer_of(TEMPLATES[name]))
    conversations = [[{**ASKED, "content": f"Weather? {index}"}] for index in range(len(params))]
    return llm.chat(conversations, params, tools=TOOLS, use_tqdm=False, **options)


def sampled(seed: int, max_tokens: int = 800) -> SamplingParams:
    # A random model would think without end.
    bias = {256 + 1 + MARKS.index("<|end|>"): 20.0}
    return SamplingParams(temperature=1, seed=seed, max_tokens=max_tokens, logit_bias=bias)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_what_is_required_is_called_and_alike_alone_and_in_company(llm: LLM, name: str) -> None:
    params = [sampled(seed) for seed in range(4)]
    options: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    outputs = [result.outputs[0] for result in chat(llm, name, params, **options)]
    for output in outputs:
        assert output.answer is not None
        assert output.finish_reason == "stop", output.text
        [call] = output.answer.tool_calls
        assert call.name == "get_weather"
        jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    asked = {**ASKED, "content": "Weather? 2"}
    alone = llm.chat([asked], params[2], tools=TOOLS, use_tqdm=False, **options)
    assert alone[0].outputs[0] == outputs[2]


@pytest.mark.parametrize("name", ["hermes", "mistral_v11"])
def test_a_call_that_a_model_begins_by_itself_is_one(llm: LLM, name: str) -> None:
    opening = {"hermes": "<tool_call>", "mistral_v11": "[TOOL_CALLS]"}[name]
    [mark] = llm.tokenizer.encode(opening)
    params = SamplingParams(temperature=1, seed=3, max_tokens=200, logit_bias={mark: 100.0})
    [result] = chat(llm, name, [params], parallel_tool_calls=False)
    answer = result.outputs[0].answer
    assert answer is not None
    [call] = answer.tool_calls
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    without = chat(llm, name, [sampled(3, 30)], tool_choice="none")[0].outputs[0]
    assert without.answer is not None
    assert not without.answer.tool_calls


def test_samples_differ_and_keep_the_form_each(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1, seed=1, max_tokens=400)
    [result] = chat(llm, "gemma4", [params], tool_choice="required", parallel_tool_calls=False)
    calls = [output.answer.tool_calls for output in result.outputs if output.answer is not None]
    assert len(calls) == 4
    assert all(len(each) == 1 for each in calls)
    assert len({output.text for output in result.outputs}) > 1


def test_reasoning_is_told_apart(llm: LLM) -> None:
    llm._chat_format = ChatFormat(tokenizer_of(THINKS_AT_ONCE))
    close = llm.tokenizer.encode("</think>")
    stop = SamplingParams(temperature=0, max_tokens=20, logit_bias={close[0]: 30.0})
    [result] = llm.chat([ASKED], stop, use_tqdm=False)
    answer = result.outputs[0].answer
    assert answer is not None
    assert answer.reasoning_content
    assert answer.content == ""
    form = {"choice": ["yes", "no"]}
    [result] = llm.chat(
        [ASKED], SamplingParams(temperature=0, max_tokens=5, structured_outputs=form), use_tqdm=False
    )
    # The reasoning goes first, and takes what tokens there are.
    assert result.outputs[0].answer is not None
    assert result.outputs[0].answer.content == ""


def test_what_is_no_tool_is_refused(llm: LLM) -> None:
    llm._chat_format = ChatFormat(tokenizer_of(TEMPLATES["hermes"]))
    with pytest.raises(RequestError, match=r"tools\[0\].function.name"):
        llm.chat([ASKED], tools=[{"type": "function", "function": {"name": "two words"}}])
    with pytest.raises(RequestError, match="there is no tool 'f'"):
        llm.chat([ASKED], tools=TOOLS, tool_choice={"type": "function", "function": {"name": "f"}})
