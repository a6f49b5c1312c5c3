"""Options as words: on a command line, in name=value and in Python each means the same, and papers name no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from engine import LLM, logs, serve
from engine.arguments import read_words
from engine.config import EngineConfig, option_types
from engine.errors import ConfigError

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
]

TEXTS = {"quant": "int8:g32", "kv_cache_memory": "16MiB"}
NEEDS = {"symmetric_memory": {"tensor_parallel_size": 2}}
"""Without which an option is refused."""

WRONG: dict[type, tuple[Any, ...]] = {
    bool: ("false", 0),
    int: ("4", 4.0, True),
    float: ("0.5", True),
    str: (b"int8", ["int8"]),
}


def kinds(name: str) -> tuple[Any, ...]:
    """The types of an option, None aside; its choices."""
    hint = option_types()[name]
    return tuple(kind for kind in get_args(hint) or (hint,) if kind is not type(None))


def values(name: str) -> list[Any]:
    if get_origin(option_types()[name]) is Literal:
        return list(kinds(name))
    examples = {bool: [True, False], int: [8], float: [0.5], str: [TEXTS.get(name, "some/where")]}
    return examples[kinds(name)[0]]


CASES = [(name, value) for name in option_types() for value in values(name)]


def flags(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_an_option_is_on_the_command_line_what_it_is_in_python(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[EngineConfig] = []
    monkeypatch.setattr(serve, "_serve", lambda config, *_: configs.append(config))
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    needs = NEEDS.get(name, {})
    words = [word for item in {**needs, name: value}.items() for word in flags(*item)]
    assert serve.main(words) == 0
    (config,) = configs
    assert config == EngineConfig(**needs, **{name: value})
    assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_an_option_is_in_words_what_it_is_in_python(name: str, value: Any) -> None:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    found = read_words({name: text})[name]
    assert found == value
    assert type(found) is type(value)
    # A file of Ray Serve's has values already.
    assert read_words({name: value}) == {name: value}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"overlap": "no"}, "overlap must be true or false, got 'no'"),
        ({"max_num_seqs": "many"}, "max_num_seqs must be an integer, got 'many'"),
        ({"gpu_memory_utilization": "half"}, "gpu_memory_utilization must be a number, got 'half'"),
    ],
)
def test_words_that_are_no_value_are_refused(words: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        read_words(words)


@pytest.mark.parametrize("name", [name for name in option_types() if bool in kinds(name)])
def test_what_is_on_or_off_takes_no_value(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_serve", lambda *_: None)
    for word in ("false", "true"):
        with pytest.raises(SystemExit) as ended:
            serve.main(["--" + name.replace("_", "-"), word])
        assert ended.value.code == 2
        usage, line = capsys.readouterr().err.splitlines()
        assert usage == "usage: python -m engine.serve [options]"
        assert line == f"python -m engine.serve: error: unrecognized arguments: {word}"


@pytest.mark.parametrize("name", option_types())
def test_a_value_of_another_type_is_refused_by_name(name: str) -> None:
    known = kinds(name)
    candidates = [value for kind in WRONG if kind in known for value in WRONG[kind]]
    wrong = [value for value in candidates if type(value) not in known] or ["no such choice", 0]
    if type(None) not in get_args(option_types()[name]):
        wrong.append(None)
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^{name} must be .*, got {re.escape(repr(value))}$"):
            EngineConfig(**{name: value})


def test_a_library_says_it_before_it_loads_anything() -> None:
    with pytest.raises(ConfigError, match=r"^overlap must be True, False or None, got 'false'$"):
        LLM(overlap="false")


def test_a_path_stands_for_its_text() -> None:
    config = EngineConfig.from_options(model=Path("some") / "model", cache_dir=Path("there"))
    assert (config.model, config.cache_dir) == ("some/model", "there")


def test_bytes_may_be_a_number() -> None:
    assert EngineConfig(kv_cache_memory=2**24) == EngineConfig(kv_cache_memory=16777216)


@cache
def options_of(command: str) -> frozenset[str]:
    """What the help of a command lists."""
    module = import_module(command)
    if not hasattr(module, "main"):
        module = import_module(f"{command}.__main__")
    shown = StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit):
        module.main(["--help"])
    return frozenset(re.findall(r"--[a-z][a-z-]*", shown.getvalue()))


COMMANDS = (
    "engine.serve",
    "engine.plan",
    "engine.selftest",
    "engine.kernels.compile",
    "engine.quality",
    "engine.quant",
    "benchmarks.cpu",
    "benchmarks.exactness",
    "benchmarks.gpu_check",
    "benchmarks.parallel",
    "benchmarks.random_gguf",
    "benchmarks.serving",
    "benchmarks.throughput",
)


def named(text: str) -> Iterator[tuple[str, str | None]]:
    """Options that a paper names: in a command, with that; quoted alone, with None."""
    for command, rest in re.findall(
        r"python -m ((?:engine|benchmarks)[\w.]*)([^`\n#]*)", text.replace("\\\n", "")
    ):
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest):
            yield option, command
    for quoted in re.findall(r"`(--[^`\n]*)`", text):
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", quoted):
            yield option, None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_papers_name_options_that_there_are(path: Path) -> None:
    everywhere = frozenset().union(*map(options_of, COMMANDS))
    for option, command in named(path.read_text()):
        known = everywhere if command is None else options_of(command)
        assert option in known, f"{option} of {command or 'any command'}"


def test_papers_are_read() -> None:
    """The reading above finds what is there."""
    text = "    python -m engine.plan --model x --gpu-memory 1GiB  # --not-this\n`--quant int4 --nor-that` and `x`"
    assert list(named(text)) == [
        ("--model", "engine.plan"),
        ("--gpu-memory", "engine.plan"),
        ("--quant", None),
        ("--nor-that", None),
    ]
    assert {"--overlap", "--no-overlap"} <= options_of("engine.serve")
    assert len(list(named((ROOT / "README.md").read_text()))) > 20
