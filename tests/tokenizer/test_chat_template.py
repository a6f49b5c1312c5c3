"""Chat templates, rendered as transformers renders them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing
from transformers.utils.chat_template_utils import render_jinja_template

from engine.errors import RequestError
from engine.loading.resolve import resolve_model
from engine.tokenizer import chat_template
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.files import TokenizerSettings, read_tokenizer
from engine.tokenizer.tokenizer import Tokenizer, load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Zwölf?"},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "Why?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<a> & é", "parameters": {}}}]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks on lines of their own": """
{{- bos_token }}
{%- for message in messages %}
    {% if message['role'] == 'system' %}
        {% continue %}
    {% endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
<start_of_turn>{{ role }}
{{ message['content'] | trim }}<end_of_turn>
    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
""",
    "tools": "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ messages | tojson }}",
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "date": "{{ strftime_now('%Y') }}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        "{{ enable_thinking is defined and enable_thinking is false }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_is_that_of_transformers(name: str) -> None:
    arguments: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
    expected, _ = render_jinja_template(
        [MESSAGES], tools=TOOLS, chat_template=TEMPLATES[name], bos_token="<s>", **arguments
    )
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"})
    assert template.render(MESSAGES, tools=TOOLS, **arguments) == expected[0]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(resolve_model("llama"))


@cache
def smollm2_backend() -> tokenizers.Tokenizer:
    return read_tokenizer(resolve_model("llama"))[0]


def with_templates(**templates: str) -> Tokenizer:
    special_tokens = {"bos_token": "<|im_start|>"}
    return Tokenizer(smollm2_backend(), TokenizerSettings(special_tokens, (2,), templates))


def test_smollm2(smollm2: Tokenizer) -> None:
    text = smollm2.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.encode_chat([{"role": "user", "content": "hi"}])
    assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert ids.count(1) == 3
    without = smollm2.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert text == without + "<|im_start|>assistant\n"


def test_text_parts_are_joined(smollm2: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = smollm2.apply_chat_template([{"role": "user", "content": parts}])
    assert joined == smollm2.apply_chat_template([{"role": "user", "content": "one\ntwo"}])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": None},
        {"role": "user", "content": 3},
        {"role": "user"},
        {"content": "a"},
        {},
        "text",
        {"role": "user", "content": "\udfff"},
    ],
)
def test_messages_that_the_template_cannot_take(smollm2: Tokenizer, message: Any) -> None:
    with pytest.raises(RequestError) as caught:
        smollm2.encode_chat([message])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
        "{% for %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ undefined_name.field }}",
    ],
)
def test_templates_that_fail(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        with_templates(default=source).apply_chat_template(MESSAGES)
    assert caught.value.field == "messages"


def test_raise_exception_reaches_the_client() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        with_templates(default="{{ raise_exception('roles must alternate') }}").encode_chat(MESSAGES)


def test_tools_are_none_unless_given() -> None:
    tokenizer = with_templates(default="{{ tools is none }} {{ documents is none }}")
    assert tokenizer.apply_chat_template(MESSAGES) == "True True"
    assert tokenizer.apply_chat_template(MESSAGES, tools=TOOLS) == "False True"


def test_tool_template_is_used_where_there_are_tools() -> None:
    tokenizer = with_templates(default="plain", tool_use="tools")
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=TOOLS) == "tools"
    assert with_templates(default="plain").apply_chat_template(MESSAGES, tools=TOOLS) == "plain"
    with pytest.raises(RequestError, match="default"):
        with_templates(rag="x").apply_chat_template(MESSAGES)


def test_directory_templates(tmp_path: Path) -> None:
    smollm2_backend().save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"

    def render() -> str:
        return load_tokenizer(tmp_path).apply_chat_template(MESSAGES)

    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from a file of its own"}))
    assert render() == "from a file of its own"
    config.write_text(json.dumps({"chat_template": "{{ bos_token }}", "bos_token": "<|im_start|>"}))
    assert render() == "<|im_start|>"
    named = [{"name": "default", "template": "named"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert render() == "named"
    (tmp_path / "chat_template.jinja").write_text("jinja file")
    assert render() == "jinja file"


def test_bos_is_written_once() -> None:
    backend, _ = read_tokenizer(resolve_model("llama"))
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    settings = TokenizerSettings({"bos_token": "<|im_start|>"}, (2,), {"default": "{{ bos_token }}hello"})
    tokenizer = Tokenizer(backend, settings)
    assert tokenizer.encode("hello")[0] == 1
    assert tokenizer.encode_chat(MESSAGES) == tokenizer.encode("hello")


WALKS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}[{{ part.text | trim }}]{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
JOINS = "{% for m in messages %}<{{ m.role }}>{{ m['content'] + '|' }}{% endfor %}"
WRITES = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "rendered"), [(WALKS, "[a][b]"), (JOINS, "<user>a \nb|"), (WRITES, "a \nb")]
)
def test_parts_reach_templates_that_walk_them(template: str, rendered: str) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    tokenizer = with_templates(default=template)
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}]) == rendered


def test_null_is_left_out() -> None:
    tokenizer = with_templates(
        default="{% for m in messages %}{{ m.content }}{{ m.content is defined }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": None}, {"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages) == "FalsexTrue"


OPEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TRIMS = OPEN.replace("m.content", "m.content | trim")


@pytest.mark.parametrize("content", ["The answer is ", "end", "<", "im", "a\nb\n", "user"])
@pytest.mark.parametrize(("template", "is_trimmed"), [(OPEN, False), (TRIMS, True)])
def test_the_last_message_stays_open(content: str, template: str, is_trimmed: bool) -> None:
    tokenizer = with_templates(default=template)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    text = tokenizer.apply_chat_template(messages, continue_final_message=True)
    first, last = (content.strip(), content.strip()) if is_trimmed else (content, content)
    assert text == f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>assistant\n{last}"


def test_a_last_part_stays_open() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = with_templates(default=WALKS).apply_chat_template(
        [{"role": "assistant", "content": content}], continue_final_message=True
    )
    assert text == "[a][b"


def test_what_cannot_stay_open() -> None:
    messages = [{"role": "assistant", "content": "x"}]
    with pytest.raises(RequestError, match="rewrites the last message"):
        with_templates(default="nothing of it").apply_chat_template(messages, continue_final_message=True)
    with pytest.raises(RequestError, match="text at the end"):
        with_templates(default=OPEN).apply_chat_template(
            [{"role": "assistant", "content": " "}], continue_final_message=True
        )


def test_additional_templates(tmp_path: Path) -> None:
    smollm2_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=TOOLS) == "tools"


def test_a_template_has_so_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERING_SECONDS", 0.05)
    pairs = "{% for a in messages %}{% for b in messages %}{% if a.role == b.x %}y{% endif %}"
    template = ChatTemplate(pairs + "{% endfor %}{% endfor %}", {})
    assert template.render([{"role": "user"}] * 10) == ""
    with pytest.raises(RequestError, match=r"ran for 0\.05 s") as raised:
        template.render([{"role": "user"}] * 100_000)
    assert raised.value.field == "messages"
    # The time of one rendering is not another's.
    assert template.render([{"role": "user"}] * 10) == ""


@pytest.mark.parametrize("source", ["{% for a in range(n) %}some text{% endfor %}", "{{ text }}"])
def test_a_template_writes_no_more_than_so_much(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARACTERS", 900)
    template = ChatTemplate(source, {})
    assert len(template.render([], n=100, text="some text" * 100)) == 900
    with pytest.raises(RequestError, match="more than 900 characters"):
        template.render([], n=101, text="some text" * 101)


def test_a_template_counts_to_no_more_than_so_much() -> None:
    with pytest.raises(RequestError, match="Range too big"):
        ChatTemplate("{% for a in range(n) %}{% endfor %}", {}).render([], n=10**9)
