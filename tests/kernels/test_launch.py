"""For which tensors Triton's kernels are launched."""

from __future__ import annotations

import pytest
from triton import knobs

from engine.kernels import launch


@pytest.mark.parametrize("value", ["1", "true", "On", "y", "YES", "0", "", "t", "2", " 1", "false"])
def test_the_interpreter_is_asked_for_as_triton_understands_it(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert launch._interprets() == knobs.runtime.interpret


def test_without_a_variable_nothing_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not launch._interprets()
    assert not knobs.runtime.interpret


def test_where_nothing_is_launched_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    assert launch.CompilationCounter(None).count == 0
    assert knobs.runtime.jit_post_compile_hook is None
    launch.CompilationCounter(launch.TARGETS["sm_90"])
    assert knobs.runtime.jit_post_compile_hook is not None
