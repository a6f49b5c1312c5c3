"""Where caches and sockets lie: without a home, with a long TMPDIR, beside other users."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine.cache_directory import cache_directory, caching_in, is_private, socket_directory

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


BUILD = "from engine.kernels import cpu; print(cpu.library() is not None)"


def build(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )


def test_kernels_of_others_are_not_loaded(tmp_path: Path) -> None:
    """What somebody else could have written there is replaced, not run."""
    build(LLM_ENGINE_CACHE=str(tmp_path))
    (library,) = (tmp_path / "kernels").iterdir()
    assert is_private(library)
    good = library.read_bytes()
    library.write_bytes(b"no library")
    library.chmod(0o666)
    assert build(LLM_ENGINE_CACHE=str(tmp_path)).stdout == "True\n"
    assert library.read_bytes() == good


def test_kernels_without_a_place_to_keep_them(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file")
    done = build(LLM_ENGINE_CACHE=str(tmp_path))
    assert done.stdout == "True\n"
    assert "they are built for each start" in done.stderr


def test_a_compiler_with_arguments(tmp_path: Path) -> None:
    assert build(LLM_ENGINE_CACHE=str(tmp_path), CC="env cc -g0").stdout == "True\n"
    assert build(LLM_ENGINE_CACHE=str(tmp_path), CC="absent-compiler -O2").stdout == "False\n"
