"""The cache of parsed weights: whatever becomes of its files, the model is the same."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.executor.runner import ModelRunner
from engine.executor.warmup import GREEDY, dummy_batch
from engine.kernels import cpu
from engine.kernels.matmul import cpu_grouped, cpu_int8
from engine.kernels.matmul.cpu_int8 import CpuFloatMatmul
from engine.loading import weights
from engine.loading.checkpoint import open_checkpoint
from engine.tokenizer.files import byte_tokenizer
from tests.conftest import COMPILED
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", TINY_CONFIGS["llama"])
    return tmp_path / "model"


def start(checkpoint: Path, quant: str = "none") -> ModelRunner:
    cache = checkpoint.parent / "cache"
    config = EngineConfig(model=str(checkpoint), quant=quant, kv_cache_memory="1MiB", cache_dir=str(cache))
    runner = ModelRunner(config, open_checkpoint(checkpoint))
    if runner.writer is not None:
        runner.writer.join()
    return runner


def table(runner: ModelRunner) -> torch.Tensor:
    assert runner.model.embedding is not None
    matmul = runner.model.embedding.table.matmul
    assert isinstance(matmul, CpuFloatMatmul)
    return matmul.weight


def cached_file(checkpoint: Path) -> Path:
    (file,) = (checkpoint.parent / "cache" / "weights").iterdir()
    return file


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def rename_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors["other"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "header": lambda file: flip(file, 20),
    "first byte of the data": lambda file: flip(file, file.stat().st_size // 2),
    "last byte": lambda file: flip(file, file.stat().st_size - 1),
    "another version": rename_tensor,
    "no checksums": lambda file: save_file(load_file(file), file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_made_anew(damage: str, checkpoint: Path) -> None:
    expected = table(start(checkpoint)).clone()
    file = cached_file(checkpoint)
    # Copies: the file is mapped, and is to be cut off.
    good = {name: tensor.clone() for name, tensor in load_file(file).items()}
    DAMAGES[damage](file)
    damaged = file.stat().st_mtime_ns
    assert torch.equal(table(start(checkpoint)), expected)
    written = file.stat().st_mtime_ns
    assert written != damaged
    again = load_file(cached_file(checkpoint))
    assert again.keys() == good.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in good.items())
    start(checkpoint)
    assert file.stat().st_mtime_ns == written


def test_a_good_file_is_not_written_again(checkpoint: Path) -> None:
    start(checkpoint)
    before = cached_file(checkpoint).stat().st_mtime_ns
    start(checkpoint)
    assert cached_file(checkpoint).stat().st_mtime_ns == before


STARTS = """
import logging, sys
from pathlib import Path
from engine import LLM, SamplingParams

logging.basicConfig(level=logging.WARNING, format="%(message)s")
path, cache = sys.argv[1:]
for quant in ("none", "int8"):
    llm = LLM(path, quant=quant, kv_cache_memory="1MiB", cache_dir=cache)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    print(llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids)
    llm.core.model.runner.writer.join()
print(list(Path(cache, "weights").iterdir()))
"""


def test_a_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    """One of 64 KiB: a line says so, nothing is left of what was begun, and it runs as with room."""
    mounted = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec")
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}/small;"
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    if subprocess.run([*mounted, mount], check=False).returncode != 0:
        pytest.skip("there are no user namespaces here")
    byte_tokenizer().save(str(checkpoint / "tokenizer.json"))
    (tmp_path / "large" / "kernels").symlink_to(COMPILED / "kernels")
    program = shlex.join([sys.executable, "-c", STARTS, str(checkpoint)])
    small, large = (
        subprocess.run(
            [*mounted, f"{mount} {link} exec {program} {tmp_path}/{name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name, link in (
            ("small", f"ln -s {COMPILED}/kernels {tmp_path}/small/kernels;"),
            ("large", ""),
        )
    )
    assert small.stdout.splitlines()[:-1] == large.stdout.splitlines()[:-1]
    assert small.stdout.endswith("\n[]\n")
    assert large.stdout.count(".safetensors") == 2
    assert small.stderr.count("No space left on device") == 2
    assert "--cache-dir" in small.stderr
    assert "Traceback" not in small.stderr


def test_a_directory_that_is_a_file(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    (checkpoint.parent / "cache").write_text("")
    start(checkpoint)
    assert "cannot be kept in" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_numbers_that_are_none_are_refused(checkpoint: Path, name: str, value: float) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        start(checkpoint, "int8")


@pytest.mark.parametrize("quant", ["none", "int8", "int4", "nf4", "int8:g32"])
def test_a_second_start_packs_nothing_and_computes_the_same(
    checkpoint: Path, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    run = cpu.run

    def note(name: str, *arguments: Any, **named: Any) -> None:
        calls.append(name)
        run(name, *arguments, **named)

    first = start(checkpoint, quant)
    for module in (cpu_int8, cpu_grouped):
        monkeypatch.setattr(module.cpu, "run", note)
    second = start(checkpoint, quant)
    assert second.writer is None
    assert not [name for name in calls if name.startswith("pack")]
    assert calls, "the products were recorded"
    batch = dummy_batch([7], GREEDY)
    assert torch.equal(first.execute(batch), second.execute(batch))


def test_whole_lines_start_with_one_in_the_file(checkpoint: Path) -> None:
    start(checkpoint, "int8")
    data = cached_file(checkpoint).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    places = [
        8 + size + begin
        for name, tensor in header.items()
        if name != "__metadata__"
        for begin, end in [tensor["data_offsets"]]
        if (end - begin) % cpu.LINE == 0
    ]
    assert len(places) > 10
    assert all(place % cpu.LINE == 0 for place in places)


def test_a_start_does_not_wait_for_the_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = Event(), Event()
    write = weights._write

    def wait(*arguments: Any) -> None:
        begun.set()
        may_end.wait()
        write(*arguments)

    monkeypatch.setattr(weights, "_write", wait)
    cache = checkpoint.parent / "cache"
    config = EngineConfig(model=str(checkpoint), quant="int8", kv_cache_memory="1MiB", cache_dir=str(cache))
    runner = ModelRunner(config, open_checkpoint(checkpoint))
    assert begun.wait()
    logits = runner.execute(dummy_batch([7], GREEDY)).clone()
    assert not list((cache / "weights").glob("*.safetensors"))
    may_end.set()
    assert runner.writer is not None
    runner.writer.join()
    assert torch.equal(start(checkpoint, "int8").execute(dummy_batch([7], GREEDY)), logits)


def test_what_a_killed_start_left_goes_after_an_hour(checkpoint: Path) -> None:
    start(checkpoint)
    file = cached_file(checkpoint)
    old, new = (file.with_name(f"{file.stem}{number}.partial") for number in (1, 2))
    for partial in (old, new):
        partial.write_bytes(b"half")
    os.utime(old, (0, 0))
    file.unlink()
    start(checkpoint)
    assert new.exists()
    assert not old.exists()


@pytest.mark.parametrize("bodies", ["c", "torch"])
def test_what_becomes_of_the_checkpoint_does_not_matter_afterwards(
    checkpoint: Path, bodies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bodies == "torch":
        monkeypatch.setattr("engine.kernels.cpu.library", lambda: None)
    runner = start(checkpoint)
    expected = runner.execute(dummy_batch([7], GREEDY)).clone()
    with (checkpoint / "model.safetensors").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(b"\0" * size)
    assert torch.equal(runner.execute(dummy_batch([7], GREEDY)), expected)
