"""The cache of parsed weights: whatever becomes of its files, the model is the same."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.executor.runner import ModelRunner
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
    return ModelRunner(config, open_checkpoint(checkpoint))


def table(runner: ModelRunner) -> torch.Tensor:
    assert runner.model.embedding is not None
    return runner.model.embedding.tensors["weight"]


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
