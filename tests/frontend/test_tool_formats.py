"""Formats of calls: what is written is read, however it is cut, and what grammars allow is what schemas allow."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import jsonschema
import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.frontend.tool_formats import TOOL_FORMATS
from engine.frontend.tool_formats.format import Answer, Tool, ToolFormat
from engine.frontend.tool_formats.lark import Lark
from engine.frontend.tool_formats.stream import Piece, StreamParser

Call = tuple[str, dict[str, Any]]


def read(tool_format: ToolFormat, texts: Iterable[str]) -> list[Piece]:
    """What a parser says of the texts, neighbours of one kind joined."""
    parser = StreamParser(tool_format.parse)
    pieces = [piece for text in texts for piece in parser.push(text)]
    joined: list[Piece] = []
    for piece in pieces + parser.push("", is_last=True):
        if joined and joined[-1].kind == piece.kind != "call":
            piece = Piece(piece.kind, joined.pop().text + piece.text)
        joined.append(piece)
    return joined


def calls_of(pieces: Iterable[Piece]) -> list[Call]:
    names = [piece.text for piece in pieces if piece.kind == "call"]
    arguments = [json.loads(piece.text) for piece in pieces if piece.kind == "arguments"]
    return list(zip(names, arguments, strict=True))


def text_of(pieces: Iterable[Piece], kind: str = "content") -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def cut(text: str, places: Iterable[int]) -> list[str]:
    """The text in pieces, cut at the places, counted modulo its length."""
    places = sorted({place % (len(text) + 1) for place in places})
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# How answers look after each vendor's documentation, whose address the format's own file has.


def write_hermes(text: str, calls: list[Call]) -> str:
    written = (
        f'<tool_call>\n{{"name": {dumps(name)}, "arguments": {dumps(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )
    return "\n".join([text, *written] if text else written)


def write_llama(text: str, calls: list[Call]) -> str:
    return (
        "".join(f'{{"name": {dumps(name)}, "parameters": {dumps(arguments)}}}' for name, arguments in calls)
        or text
    )


def write_mistral(text: str, calls: list[Call]) -> str:
    written = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return text + (f"[TOOL_CALLS]{dumps(written)}" if written else "")


def write_mistral_v11(text: str, calls: list[Call]) -> str:
    return text + "".join(f"[TOOL_CALLS]{name}[ARGS]{dumps(arguments)}" for name, arguments in calls)


def write_gemma(opening: str, closing: str, quotes: str) -> Callable[[str, list[Call]], str]:
    def value(value: Any) -> str:
        match value:
            case str():
                return f"{quotes}{value}{quotes}"
            case list():
                return f"[{','.join(map(write_value, value))}]"
            case dict():
                return f"{{{','.join(f'{key}:{write_value(value)}' for key, value in value.items())}}}"
        return dumps(value)

    write_value = value

    def write(text: str, calls: list[Call]) -> str:
        return text + "".join(f"{opening}call:{name}{value(arguments)}{closing}" for name, arguments in calls)

    return write


def write_deepseek(head: str, separator: str, end: str) -> Callable[[str, list[Call]], str]:
    def write(text: str, calls: list[Call]) -> str:
        written = (
            f"<｜tool▁call▁begin｜>{head}{name}{separator}{dumps(arguments)}{end}<｜tool▁call▁end｜>"
            for name, arguments in calls
        )
        joined = ("\n" if head else "").join(written)
        return text + (f"<｜tool▁calls▁begin｜>{joined}<｜tool▁calls▁end｜>" if calls else "")

    return write


def write_harmony(text: str, calls: list[Call]) -> str:
    head = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
    if not calls:
        return f"{head}<|channel|>final<|message|>{text}"
    [(name, arguments)] = calls
    preamble = f"<|channel|>commentary<|message|>{text}<|end|><|start|>assistant"
    call = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(arguments)}<|call|>"
    return head + preamble + call


def write_pythonic(text: str, calls: list[Call]) -> str:
    written = (
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    )
    return f"[{', '.join(written)}]" if calls else text


def write_lfm2(text: str, calls: list[Call]) -> str:
    return text + (f"<|tool_call_start|>{write_pythonic('', calls)}<|tool_call_end|>" if calls else "")


WRITERS = {
    "hermes": write_hermes,
    "llama3_json": write_llama,
    "mistral": write_mistral,
    "mistral_v11": write_mistral_v11,
    "gemma4": write_gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": write_gemma("<start_function_call>", "<end_function_call>", "<escape>"),
    "deepseek_v3": write_deepseek("function<｜tool▁sep｜>", "\n```json\n", "\n```"),
    "deepseek_v31": write_deepseek("", "<｜tool▁sep｜>", ""),
    "harmony": write_harmony,
    "pythonic": write_pythonic,
    "lfm2": write_lfm2,
}
WITHOUT_TEXT = ("llama3_json", "pythonic")
"""Formats whose calls are all of the answer."""

MARKS = tuple(mark for tool_format in TOOL_FORMATS.values() for mark in tool_format.marks)
WORDS = st.sampled_from(
    [
        "a",
        "0",
        " ",
        "\n",
        "é",
        "😀",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "\\",
        ",",
        ":",
        "=",
        "<",
        "|",
        "(",
        ")",
        "`",
    ]
)
PLAIN = st.lists(WORDS | st.sampled_from([mark[:-1] for mark in MARKS]), max_size=8).map("".join)
STRINGS = PLAIN | st.lists(WORDS | st.sampled_from(MARKS), max_size=8).map("".join)
NAMES = st.sampled_from(["f", "get_weather", "a-b", "x9"])
KEYS = st.sampled_from(["a", "city", "number_of_days"])


def values(strings: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | strings,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=6,
    )


def answers(name: str) -> st.SearchStrategy[tuple[str, list[Call]]]:
    """Text and calls that the format can say; where marks end strings, strings hold none."""
    marks = TOOL_FORMATS[name].marks
    plain = PLAIN.filter(lambda text: not any(mark in text for mark in marks))
    strings = plain if name in ("gemma4", "functiongemma") else STRINGS
    arguments = st.dictionaries(KEYS, values(strings), max_size=3)
    most = 3 if TOOL_FORMATS[name].has_parallel_calls else 1
    calls = st.lists(st.tuples(NAMES, arguments), max_size=most)
    return st.tuples(plain, calls)


@pytest.mark.parametrize("name", TOOL_FORMATS)
@settings(max_examples=20)
@given(data=st.data())
def test_what_is_written_is_read_however_it_is_cut(name: str, data: st.DataObject) -> None:
    text, calls = data.draw(answers(name))
    if name in WITHOUT_TEXT and not calls and text.lstrip().startswith(("{", "[")):
        return
    written = WRITERS[name](text, calls)
    whole = read(TOOL_FORMATS[name], [written])
    assert calls_of(whole) == calls
    if not calls:
        assert text_of(whole) == text
    elif name not in WITHOUT_TEXT:
        assert text_of(whole) == (text if name == "harmony" else text.rstrip())
    assert read(TOOL_FORMATS[name], written) == whole
    places = data.draw(st.lists(st.integers(min_value=0, max_value=10**4), max_size=6))
    assert read(TOOL_FORMATS[name], cut(written, places)) == whole


@pytest.mark.parametrize("name", TOOL_FORMATS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_text_is_read_alike_however_it_is_cut(name: str, data: st.DataObject) -> None:
    """What is no answer of the format, too: calls that break off, marks amid them, text between and after calls."""
    parts = data.draw(st.lists(answers(name), min_size=1, max_size=3))
    text = "".join(WRITERS[name](*part) for part in parts)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    text = text[:start] + text[end:]
    whole = read(TOOL_FORMATS[name], [text])
    assert read(TOOL_FORMATS[name], text) == whole
    places = data.draw(st.lists(st.integers(min_value=0, max_value=10**4), max_size=6))
    assert read(TOOL_FORMATS[name], cut(text, places)) == whole


@pytest.mark.parametrize("name", sorted(set(TOOL_FORMATS) - {"harmony"}))
def test_text_streams_and_arguments_do(name: str) -> None:
    """Nothing is held back but white space and what may begin a mark."""
    parser = StreamParser(TOOL_FORMATS[name].parse)
    assert parser.push("It is warm") == [Piece("content", "It is warm")]
    if name in ("pythonic", "lfm2"):
        return
    parser = StreamParser(TOOL_FORMATS[name].parse)
    written = WRITERS[name]("", [("f", {"text": "once upon a time"})])
    place = written.index("upon")
    pieces = parser.push(written[:place])
    assert [piece.kind for piece in pieces] == ["call", "arguments"]
    assert pieces[1].text == '{"text": "once '


def test_a_call_that_is_cut_off_is_as_far_as_it_is() -> None:
    written = '<tool_call>\n{"name": "f", "arguments": {"a": "Par'
    assert read(TOOL_FORMATS["hermes"], [written]) == [Piece("call", "f"), Piece("arguments", '{"a": "Par')]
    assert read(TOOL_FORMATS["hermes"], ['Now:\n<tool_call>\n{"name": "f']) == [Piece("content", "Now:")]


def test_what_is_no_call_is_text() -> None:
    written = "A <tool_call>[f]</tool_call> and <tool_call"
    assert read(TOOL_FORMATS["hermes"], [written]) == [Piece("content", written)]


# Grammars.

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where."},
        "unit": {"enum": ["celsius", "fahrenheit", None]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "hourly": {"type": ["boolean", "null"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "flags": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/code"}]}},
        "place": {
            "type": "object",
            "properties": {"code": {"$ref": "#/$defs/code"}, "note": {"type": "string"}},
            "required": ["note"],
            "additionalProperties": False,
        },
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"code": {"type": "string", "pattern": "^[A-Z]{2}$"}},
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [Tool("get_weather", PARAMETERS), Tool("get_weather_2", NOTHING)]
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}

SPECIAL = tuple(dict.fromkeys(MARKS))


class Vocabulary:
    """Tokens that are bytes, marks that are special tokens, and the end."""

    eos_token_id = 256 + len(SPECIAL)
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), *(mark.encode() for mark in SPECIAL), b"<end>")
    special_token_ids = tuple(range(256, 257 + len(SPECIAL)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@pytest.fixture(scope="module")
def vocabulary() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()))


def special(mark: str) -> int | None:
    return 256 + SPECIAL.index(mark) if mark in SPECIAL else None


def nothing_special(mark: str) -> int | None:
    return None


def source_of(tool_format: ToolFormat, answer: Answer, special_token_id: Callable[[str], int | None]) -> str:
    lark = Lark(special_token_id)
    return lark.source(tool_format.grammar(lark, answer))


def encode(text: str, has_special_tokens: bool) -> list[int]:
    token_ids: list[int] = []
    while text:
        mark = next((mark for mark in SPECIAL if text.startswith(mark)), None) if has_special_tokens else None
        token_ids += list(text[0].encode()) if mark is None else [256 + SPECIAL.index(mark)]
        text = text[1 if mark is None else len(mark) :]
    return token_ids


def is_answer(vocabulary: llguidance.LLTokenizer, source: str, token_ids: list[int]) -> bool:
    matcher = llguidance.LLMatcher(vocabulary, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.validate_tokens(token_ids) == len(token_ids) and (
        matcher.consume_tokens(token_ids) and matcher.is_accepting()
    )


WEATHER = ("get_weather", {"city": "Zürich", "unit": "celsius", "days": 3, "hourly": True})


@pytest.mark.parametrize("has_special_tokens", [False, True])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_grammars_take_what_the_vendors_write(
    vocabulary: llguidance.LLTokenizer, name: str, has_special_tokens: bool
) -> None:
    tool_format = TOOL_FORMATS[name]
    special_token_id = special if has_special_tokens else nothing_special

    def takes(answer: Answer, written: str) -> bool:
        source = source_of(tool_format, answer, special_token_id)
        # This mark is an end-of-sequence token.
        return is_answer(vocabulary, source, encode(written.removesuffix("<|call|>"), has_special_tokens))

    one = WRITERS[name]("", [WEATHER])
    if name == "harmony":
        # A preamble of nothing is none.
        one = one.replace("<|channel|>commentary<|message|><|end|><|start|>assistant", "")
    text = WRITERS[name]("It is < 5 [°C] {now}.", [])
    auto, required = Answer(TOOLS, False, True), Answer(TOOLS, True, True)
    assert takes(auto, one)
    assert takes(required, one)
    assert takes(auto, text)
    assert not takes(required, text)
    assert not takes(auto, WRITERS[name]("", [("get_time", {})]))
    assert not takes(auto, WRITERS[name]("", [("get_weather", {"city": "Rome"})]))
    if tool_format.has_parallel_calls:
        two = WRITERS[name]("", [WEATHER, ("get_weather_2", {})])
        assert takes(auto, two)
        assert not takes(Answer(TOOLS, False, False), two)
    if name not in WITHOUT_TEXT:
        assert takes(auto, WRITERS[name]("I look.", [WEATHER]))


@pytest.mark.parametrize("name", sorted(set(TOOL_FORMATS) - set(WITHOUT_TEXT)))
def test_text_does_not_spell_the_mark_of_a_call(vocabulary: llguidance.LLTokenizer, name: str) -> None:
    """The parser sees text alone, and would take it for the special token."""
    source = source_of(TOOL_FORMATS[name], Answer(TOOLS, False, True), special)
    text = WRITERS[name]("Write it so: MARK.", [])
    token_ids = encode(text.replace("MARK", "a mark"), True)
    assert is_answer(vocabulary, source, token_ids)
    before, after = (encode(part, True) for part in text.split("MARK"))
    opening = TOOL_FORMATS[name].marks[0]
    assert not is_answer(vocabulary, source, [*before, *opening.encode(), *after])


def walk(vocabulary: llguidance.LLTokenizer, source: str, draw: random.Random) -> tuple[str, bool]:
    """A random answer that a grammar allows, and whether it came to an end."""
    matcher = llguidance.LLMatcher(vocabulary, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    taken = b""
    likely = {*b'"}],)', *Vocabulary.special_token_ids}
    for _ in range(1500):
        allowed = [index for index, bias in enumerate(matcher.compute_logit_bias()) if bias]
        # Ends of things are likelier than chance would have it.
        ends = [index for index in allowed if index in likely]
        token_id = draw.choice(ends if ends and draw.random() < 0.3 else allowed)
        if token_id == Vocabulary.eos_token_id:
            return taken.decode(), True
        assert matcher.consume_token(token_id)
        taken += Vocabulary.tokens[token_id]
        if matcher.is_stopped():
            return taken.decode(), True
    return taken.decode("utf-8", "ignore"), False


@pytest.mark.parametrize("has_special_tokens", [False, True])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_call_that_a_grammar_allows_is_one_that_its_schema_allows(
    vocabulary: llguidance.LLTokenizer, name: str, has_special_tokens: bool
) -> None:
    tool_format = TOOL_FORMATS[name]
    draw = random.Random(name)
    num_ended = 0
    for is_required in (True, False) * 4:
        special_token_id = special if has_special_tokens else nothing_special
        answer = Answer(TOOLS, is_required, tool_format.has_parallel_calls)
        written, has_ended = walk(vocabulary, source_of(tool_format, answer, special_token_id), draw)
        pieces = read(tool_format, written)
        assert pieces == read(tool_format, [written])
        if not has_ended:
            continue
        num_ended += 1
        calls = calls_of(pieces)
        assert calls or not is_required
        for called, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[called])
    assert num_ended > 2


RECURSIVE = {
    "type": "object",
    "properties": {"a": {"$ref": "#"}, "b": {"const": 1}},
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("parameters", "keyword"),
    [
        ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "minProperties"),
        ({"type": "object", "required": ["a"]}, "required 'a'"),
        (RECURSIVE, "ref"),
    ],
)
def test_what_pythonic_cannot_keep_is_refused(parameters: dict[str, Any], keyword: str) -> None:
    with pytest.raises(RequestError, match=keyword):
        source_of(TOOL_FORMATS["pythonic"], Answer([Tool("f", parameters)], True, True), nothing_special)


def test_a_schema_that_refers_to_itself_is_kept_as_json(vocabulary: llguidance.LLTokenizer) -> None:
    source = source_of(TOOL_FORMATS["gemma4"], Answer([Tool("f", RECURSIVE)], True, True), nothing_special)
    for arguments, expected in (
        ('{"a": {"a": {}, "b": 1}}', True),
        ('{"a": {"c": 1}}', False),
        ("{a:{}}", False),
    ):
        written = f"<|tool_call>call:f{arguments}<tool_call|>"
        assert is_answer(vocabulary, source, encode(written, False)) == expected
