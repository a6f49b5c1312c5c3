"""Chat templates with tools, by format: short ones of our own, after the documents that the formats' files name."""

from __future__ import annotations

import tokenizers

from engine.frontend.tool_formats import TOOL_FORMATS
from engine.tokenizer.files import TokenizerSettings, byte_tokenizer
from engine.tokenizer.tokenizer import Tokenizer

EOS, END_TOKEN_ID = "<|eot|>", 256
MARKS = tuple(dict.fromkeys(mark for tool_format in TOOL_FORMATS.values() for mark in tool_format.marks))
"""Marks of calls, which are tokens; those of reasoning are text."""

_BEGIN = """{% for message in messages %}\
{% if message.role == 'system' %}{{ '<|sys|>' + message.content + '<|eot|>' }}\
{% elif message.role == 'user' %}{{ '<|user|>' + message.content + '<|eot|>' }}\
{% elif message.role == 'tool' %}{{ '<|tool|>' + message.content + '<|eot|>' }}\
{% else %}{{ '<|bot|>' }}{{ message.content or '' }}"""
_END = """{{ '<|eot|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"""
_TOOLS = "{% if tools %}{{ '<|sys|>' + (tools | tojson) + '<|eot|>' }}{% endif %}"


def _template(calls: str) -> str:
    return f"{_TOOLS}{_BEGIN}{{% if message.tool_calls %}}{calls}{{% endif %}}{_END}"


_SET = "{% set f = call.function %}{% set args = f.arguments | tojson %}"


def _each(call: str, first: str = "", between: str = "", last: str = "") -> str:
    """A call each, of which `call` writes `f`, its function, and `args`, the arguments as JSON."""
    joined = f"{{% if not loop.first %}}{{{{ {between!r} }}}}{{% endif %}}" if between else ""
    loop = f"{{% for call in message.tool_calls %}}{_SET}{joined}{call}{{% endfor %}}"
    return f"{{{{ {first!r} }}}}{loop}{{{{ {last!r} }}}}"


_GEMMA = """{%- macro value(v) -%}{%- if v is string -%}{{ QUOTE + v + QUOTE }}\
{%- elif v is boolean -%}{{ 'true' if v else 'false' }}\
{%- elif v is mapping -%}{{ '{' }}{%- for k, w in v.items() -%}{{ k + ':' }}{{ value(w) }}{{ ',' if not loop.last }}\
{%- endfor -%}{{ '}' }}{%- else -%}{{ v | tojson }}{%- endif -%}{%- endmacro -%}"""


def _gemma(opening: str, closing: str, quotes: str) -> str:
    call = f"{{{{ {opening + 'call:'!r} + f.name }}}}{{{{ value(f.arguments) }}}}{{{{ {closing!r} }}}}"
    return _GEMMA.replace("QUOTE", repr(quotes)) + _template(_each(call))


TEMPLATES = {
    "hermes": _template(
        _each(
            """{{ '<tool_call>\n{"name": "' + f.name + '", "arguments": ' + args + '}\n</tool_call>' }}""",
            between="\n",
        )
    ),
    "llama3_json": _template(
        _each("""{{ '{"name": "' + f.name + '", "parameters": ' + args + '}' }}""")
    ),
    "mistral": _template(
        _each(
            """{{ '{"name": "' + f.name + '", "arguments": ' + args + ', "id": "' + call.id + '"}' }}""",
            "[TOOL_CALLS][", ", ", "]",
        )
    ),
    "mistral_v11": _template(_each("{{ '[TOOL_CALLS]' + f.name + '[ARGS]' + args }}")),
    "gemma4": _gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": _gemma("<start_function_call>", "<end_function_call>", "<escape>"),
    "deepseek_v3": _template(
        _each(
            "{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + f.name + '\n```json\n' + f.arguments + "
            "'\n```<｜tool▁call▁end｜>' }}",
            "<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>",
        )
    ),
    "deepseek_v31": _template(
        _each(
            "{{ '<｜tool▁call▁begin｜>' + f.name + '<｜tool▁sep｜>' + args + '<｜tool▁call▁end｜>' }}",
            "<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>",
        )
    ),
    "harmony": (
        _TOOLS
        + """{% for message in messages %}{% if message.role != 'assistant' %}\
{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}\
{% elif message.tool_calls %}{% set f = message.tool_calls[0].function %}\
{{ '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}\
{{ f.arguments | tojson }}{{ '<|call|>' }}\
{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
    ),
    "pythonic": _template(
        _each(
            "{{ f.name + '(' }}{% for k, v in f.arguments.items() %}{{ k + '=' + (v | tojson) }}"
            "{{ ', ' if not loop.last }}{% endfor %}{{ ')' }}",
            "[", ", ", "]",
        )
    ),
    "lfm2": _template(
        _each(
            "{{ f.name + '(' }}{% for k, v in f.arguments.items() %}{{ k + '=' + (v | tojson) }}"
            "{{ ', ' if not loop.last }}{% endfor %}{{ ')' }}",
            "<|tool_call_start|>[", ", ", "]<|tool_call_end|>",
        )
    ),
}  # fmt: skip

PLAIN = f"{_BEGIN}{_END}"
"""One that knows no tools."""

WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
"""One that knows no system messages, either."""

UNKNOWN = _template(_each("{{ '<call ' + f.name + '>' + args + '</call>' }}"))
"""One that writes calls in a way of its own."""

THINKING = (
    _BEGIN.replace("message.content or ''", "(message.content or '').split('</think>')[-1]")
    + _END
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
"""One that leaves thoughts out, and has a switch."""

THINKS_AT_ONCE = PLAIN + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
"""One that opens the reasoning itself."""


def tokenizer_of(template: str) -> Tokenizer:
    """Tokens that are bytes, all marks as special tokens, and the template."""
    return Tokenizer(
        byte_tokens(), TokenizerSettings({"eos_token": EOS}, (END_TOKEN_ID,), {"default": template})
    )


def byte_tokens() -> tokenizers.Tokenizer:
    backend = byte_tokenizer()
    backend.add_special_tokens([EOS, *MARKS])
    return backend
