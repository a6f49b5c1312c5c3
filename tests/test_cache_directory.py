"""Where caches and sockets lie: without a home, with a long TMPDIR, beside other users."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from engine.cache_directory import cache_directory, caching_in, is_private, socket_directory
from engine.kernels import cpu
from engine.tokenizer.files import byte_tokenizer
from tests.conftest import COMPILED
from tests.helpers.gguf_file import write_gguf_model
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

ROOT = Path(__file__).parents[1]


def test_what_goes_before_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("LLM_ENGINE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path("/home/user/.cache/llm-engine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_directory() == Path("/cache/llm-engine")
    with caching_in(None):
        assert cache_directory() == Path("/cache/llm-engine")
    with caching_in(str(tmp_path)):
        assert cache_directory() == tmp_path
    assert cache_directory() == Path("/cache/llm-engine")
    monkeypatch.setenv("LLM_ENGINE_CACHE", "/other")
    with caching_in(str(tmp_path)):
        assert cache_directory() == tmp_path
    assert cache_directory() == Path("/other")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LLM_ENGINE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert cache_directory() == Path(tempfile.gettempdir()) / f"llm-engine-{os.geteuid()}"


@pytest.mark.parametrize("length", [10, 60, 70, 73, 74, 75, 90, 200])
def test_paths_of_sockets_are_short_enough(
    length: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Path("/tmp") / ("x" * (length - len("/tmp/")))
    long.mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    try:
        with socket_directory() as directory:
            assert len(f"{directory}/engine-beats".encode()) < 108
            assert (Path(directory).parent == long) == (length <= 74)
            assert Path(directory).stat().st_mode & 0o77 == 0
    finally:
        long.rmdir()


def test_private_is_what_nobody_else_can_write(tmp_path: Path) -> None:
    file = tmp_path / "a.so"
    file.write_bytes(b"")
    for mode, expected in ((0o600, True), (0o755, True), (0o664, False), (0o602, False)):
        file.chmod(mode)
        assert is_private(file) == expected


ENGINES = """
import asyncio, hashlib, json, os, sys
from engine import EngineConfig, SamplingParams
from engine.frontend.async_engine import AsyncEngine
from engine.loading import resolve

# A packaged model as an alias has it, in packages that the test wrote.
resolve.MODEL_ALIASES["parts"] = resolve.PackagedModel(
    file_name="joined.gguf",
    parts=(("first_part", "a"), ("second_part", "b")),
    sha256=os.environ.get("SHA256", ""),
    install_command="",
    repository="",
)

async def run(**options):
    engine = AsyncEngine(EngineConfig(kv_cache_memory="1MiB", num_threads=1, **options))
    try:
        await engine.start()
        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        return [output.outputs[0].token_ids async for output in engine.generate([5, 6], params, "0")]
    finally:
        await engine.shutdown()

async def main():
    return await asyncio.gather(*(run(**options) for options in json.loads(sys.argv[1])))

print(len(asyncio.run(main())), "engines", os.environ.get("LLM_ENGINE_CACHE"))
"""


def run_engines(
    engines: list[dict[str, Any]], environment: dict[str, str], before: tuple[str, ...] = ()
) -> str:
    """Has engines of a process run at once; what it says at its end.

    Args:
        environment: All of it but PATH.
        before: Starts the process.
    """
    done = subprocess.run(
        [*before, sys.executable, "-c", ENGINES, json.dumps(engines)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "OMP_WAIT_POLICY": "passive", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(directory: Path) -> set[str]:
    """Those below it, but for what lies behind links."""
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if not file.is_dir()}


@pytest.mark.process
def test_engines_keep_all_of_it_where_they_are_told(tmp_path: Path) -> None:
    """Of two that a program starts at once, one of two ranks, each in a directory of its own."""
    model = tmp_path / "model.gguf"
    write_gguf_model(model, TINY_CONFIGS["llama"], GGMLQuantizationType.F32)
    data = model.read_bytes()
    for package, file, part in (("first_part", "a", data[:5000]), ("second_part", "b", data[5000:])):
        (tmp_path / "packages" / package).mkdir(parents=True)
        (tmp_path / "packages" / package / file).write_bytes(part)
    home, first, second = (tmp_path / name for name in ("home", "first", "second"))
    for directory in (home, first, second):
        directory.mkdir()
    for directory in (first, second):
        (directory / "kernels").symlink_to(COMPILED / "kernels")
    environment = {
        "HOME": str(home),
        "PYTHONPATH": str(tmp_path / "packages"),
        "SHA256": hashlib.sha256(data).hexdigest(),
    }
    engines = [
        {"model": "parts", "cache_dir": str(first), "tensor_parallel_size": 2},
        {"model": "parts", "cache_dir": str(second)},
    ]
    assert run_engines(engines, environment) == "2 engines None\n"
    for directory, num_weights in ((first, 2), (second, 1)):
        kinds = sorted(file.split("/")[0] for file in files(directory))
        assert kinds == ["models", *["weights"] * num_weights]
    assert files(home) == set()


UNKNOWN = 54321
"""A user that no list of users has."""


@pytest.mark.process
def test_a_user_without_a_home_whose_temporary_directory_is_deep(tmp_path: Path) -> None:
    """Sockets, of two ranks as well, lie elsewhere; what is kept lies there."""
    without_entry = ("unshare", "--user", f"--map-user={UNKNOWN}")
    if subprocess.run([*without_entry, "true"], check=False).returncode != 0:
        pytest.skip("there are no user namespaces here")
    write_checkpoint(tmp_path / "model", TINY_CONFIGS["llama"])
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    engines = [{"model": str(tmp_path / "model"), "tensor_parallel_size": 2}]
    # Torch's bodies, so that nothing is built.
    environment = {"TMPDIR": str(deep), "ENGINE_CPU_KERNELS": "torch"}
    assert run_engines(engines, environment, without_entry) == "1 engines None\n"
    kept = files(deep)
    assert {file.rsplit("/", 1)[0] for file in kept} == {f"llm-engine-{UNKNOWN}/weights"}
    assert len(kept) == 2


BUILD = "from engine.kernels import cpu; print(cpu.library() is not None)"

COMPILER = """#!/bin/sh
# Takes half a minute less than a compiler: copies its first argument to what it is asked to write.
if [ "$2" = --version ]; then echo copier; exit; fi
library=$1
while [ "$1" != -o ]; do shift; done
cp "$library" "$2"
"""


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What $CC may be: a program and its argument."""
    library = cpu.library()
    if library is None:
        pytest.skip("there is no C compiler on this machine")
    script = tmp_path_factory.mktemp("compiler") / "compiler"
    script.write_text(COMPILER)
    script.chmod(0o755)
    return f"{script} '{library.functions._name}'"


def build(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )


def test_kernels_of_others_are_not_loaded(tmp_path: Path, copier: str) -> None:
    """What somebody else could have written there is replaced, not run."""
    build(LLM_ENGINE_CACHE=str(tmp_path), CC=copier)
    (library,) = (tmp_path / "kernels").iterdir()
    assert is_private(library)
    good = library.read_bytes()
    library.write_bytes(b"no library")
    library.chmod(0o666)
    assert build(LLM_ENGINE_CACHE=str(tmp_path), CC=copier).stdout == "True\n"
    assert library.read_bytes() == good


def test_damaged_kernels_are_built_again(tmp_path: Path, copier: str) -> None:
    build(LLM_ENGINE_CACHE=str(tmp_path), CC=copier)
    (library,) = (tmp_path / "kernels").iterdir()
    good = library.read_bytes()
    library.write_bytes(good[:5000])
    done = build(LLM_ENGINE_CACHE=str(tmp_path), CC=copier)
    assert done.stdout == "True\n"
    assert f"{library} is damaged" in done.stderr
    assert library.read_bytes() == good
    assert build(LLM_ENGINE_CACHE=str(tmp_path), CC=copier).stderr == ""


def test_a_full_disk_keeps_no_kernels(
    tmp_path: Path, copier: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLM_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    level = cpu.LEVELS["portable"]
    path = cpu._build(shlex.split(copier), b"1", level)
    assert tmp_path not in path.parents
    assert "there is no space left" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("LLM_ENGINE_CACHE", str(tmp_path))
    kept = cpu._build(shlex.split(copier), b"1", level)
    assert kept.parent == tmp_path / "kernels"
    # What is there needs no space.
    monkeypatch.setattr(cpu.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert cpu._build(shlex.split(copier), b"1", level) == kept


def test_kernels_without_a_place_to_keep_them(tmp_path: Path, copier: str) -> None:
    (tmp_path / "kernels").write_text("a file")
    done = build(LLM_ENGINE_CACHE=str(tmp_path), CC=copier)
    assert done.stdout == "True\n"
    assert "they are built for each start" in done.stderr


def test_a_compiler_that_is_not_there(tmp_path: Path) -> None:
    assert build(LLM_ENGINE_CACHE=str(tmp_path), CC="absent-compiler -O2").stdout == "False\n"
