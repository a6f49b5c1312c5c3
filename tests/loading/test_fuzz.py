"""Damaged files: each ends in one line that names the file, or loads; none in a traceback, a crash or a wait, nor
takes memory as its numbers say.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.executor.runner import ModelRunner
from engine.loading.checkpoint import open_checkpoint
from engine.tokenizer import load_tokenizer
from engine.tokenizer.files import byte_tokenizer
from tests.helpers.gguf_file import write_gguf_model
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    2**40,
    0.5,
    -1e300,
    float("nan"),
    "",
    "x",
    [],
    [1],
    [None],
    {},
    {"a": 1},
]
"""What keys of configurations become."""

Mutation = tuple[str, Callable[[], None]]

MEMORY = 2**29
"""How many bytes loading may take."""

EVERY = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
"""A sample of the mutations, and all of them."""


def load(path: Path) -> None:
    """As far as a start goes before its first step."""
    checkpoint = open_checkpoint(path)
    load_tokenizer(path)
    cache = str((path if path.is_dir() else path.parent).parent / "cache")
    config = EngineConfig(model=str(path), kv_cache_memory="1MiB", max_num_seqs=2, cache_dir=cache)
    ModelRunner(config, checkpoint)


def survivors(path: Path, mutations: Iterator[Mutation], every: int) -> list[str]:
    """The mutations whose loading does not end well, one of so many tried, in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        # Threads do not survive a fork: what C or torch would ask others for, this process does itself.
        torch.set_num_threads(1)
        # These models are small: what takes more has believed a number of the file.
        limit = psutil.Process().memory_info().data + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        with os.fdopen(write, "w") as report:
            for name, mutate in islice(mutations, 0, None, every):
                report.write(f"?{name}\n")
                report.flush()
                mutate()
                try:
                    signal.alarm(60)
                    load(path)
                except EngineError as error:
                    if "\n" in str(error):
                        report.write(f"!{name}: several lines: {error!r}\n")
                except BaseException as error:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    report.write(f"!{name}: {type(error).__name__}: {str(error)[:100]!r} at {place.name}\n")
                finally:
                    signal.alarm(0)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as report:
        lines = report.read().splitlines()
    _, status = os.waitpid(child, 0)
    bad = [line[1:] for line in lines if line.startswith("!")]
    if status != 0:
        bad.append(f"{lines[-1][1:] if lines else 'start'}: the process ended with status {status}")
    return bad


def changed(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The JSON value with one of its parts left out or replaced."""
    if not isinstance(value, dict):
        return
    for key in value:
        without = {name: part for name, part in value.items() if name != key}
        yield f"{where}{key} left out", without
        for new in VALUES:
            yield f"{where}{key} = {new!r}", {**value, key: new}
        for name, part in changed(value[key], f"{where}{key}."):
            yield name, {**value, key: part}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    config = copy.deepcopy(TINY_CONFIGS["llama-yarn"])
    config.num_hidden_layers = 1
    write_checkpoint(path, config)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "a", "chat_template": "x", "added_tokens_decoder": {"0": {"content": "!"}}})
    )
    return path


def json_mutations(file: Path, extra: dict[str, Any] | None = None) -> Iterator[Mutation]:
    original = file.read_text()
    for name, value in changed({**json.loads(original), **(extra or {})}):
        yield f"{file.name}: {name}", lambda value=value: file.write_text(json.dumps(value))  # type: ignore[misc]
    for text in ("", "[]", "null", "{", "[" * 100_000, "\ud800"):
        data = text.encode("utf-8", "surrogatepass")
        yield f"{file.name}: {text[:10]!r}", lambda data=data: file.write_bytes(data)  # type: ignore[misc]
    yield f"{file.name} as it was", lambda: file.write_text(original)


def byte_mutations(file: Path, count: int, header: int) -> Iterator[Mutation]:
    """Bytes changed, most of them in the header; cut off; doubled."""
    good = file.read_bytes()
    generator = random.Random(0)

    def write(data: bytes) -> Callable[[], None]:
        return lambda: file.write_bytes(data) and None

    for index in range(count):
        data = bytearray(good)
        limit = min(header, len(data)) if index % 4 else len(data)
        for _ in range(generator.choice((1, 1, 4))):
            data[generator.randrange(limit)] = generator.choice((0, 1, 0x7F, 0xFF, generator.randrange(256)))
        yield f"{file.name}: bytes {index}", write(bytes(data))
    for length in sorted({0, 1, 7, 8, 9, header // 2, header, len(good) // 2, len(good) - 1}):
        yield f"{file.name}: {length} bytes of it", write(good[:length])
    yield f"{file.name}: more than it", write(good + good)


@EVERY
@pytest.mark.parametrize(
    ("file", "extra"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}),
        ("config.json", {"sliding_window": 5, "layer_types": ["full_attention"], "head_dim": 16}),
        ("generation_config.json", {"temperature": 0.5, "top_p": 0.9, "eos_token_id": [1, 2]}),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": ["b"], "bos_token": {"content": "b", "lstrip": True}},
        ),
        ("tokenizer.json", None),
    ],
)
def test_json(directory: Path, file: str, extra: dict[str, Any] | None, every: int) -> None:
    assert survivors(directory, json_mutations(directory / file, extra), every) == []


@EVERY
def test_safetensors(directory: Path, every: int) -> None:
    file = directory / "model.safetensors"
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert survivors(directory, byte_mutations(file, 200, header + 8), every) == []


@EVERY
def test_safetensors_header(directory: Path, every: int) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])

    def mutations() -> Iterator[Mutation]:
        for name, value in changed(header):
            text = json.dumps(value).encode()
            new = struct.pack("<Q", len(text)) + text + data[8 + length :]
            yield f"header: {name}", lambda new=new: file.write_bytes(new)  # type: ignore[misc]

    assert survivors(directory, mutations(), every) == []


@EVERY
def test_index(directory: Path, every: int) -> None:
    weight_map = dict.fromkeys(load_file(directory / "model.safetensors"), "part.safetensors")
    shutil.move(directory / "model.safetensors", directory / "part.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "folder.safetensors").mkdir()
    os.mkfifo(directory / "pipe.safetensors")
    (directory / "device.safetensors").symlink_to("/dev/zero")

    def mutations() -> Iterator[Mutation]:
        yield from json_mutations(index)
        for file in ("folder", "pipe", "device", "../model/part", "/etc/passwd", "config.json", "absent"):
            name = file if "." in file or "/" in file else f"{file}.safetensors"
            new = json.dumps({"weight_map": {**weight_map, "model.norm.weight": name}})
            yield f"index: {name}", lambda new=new: index.write_text(new)  # type: ignore[misc]

    assert survivors(directory, mutations(), every) == []


@EVERY
def test_gguf(tmp_path: Path, every: int) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "model.gguf"
    config = copy.deepcopy(TINY_CONFIGS["llama"])
    config.num_hidden_layers = 1
    config.intermediate_size = 96
    write_gguf_model(file, config, GGMLQuantizationType.Q4_0)
    assert survivors(file, byte_mutations(file, 300, 4096), every) == []
