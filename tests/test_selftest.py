"""The self-test tells a broken reduction, what was not exercised, and where nothing is promised."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest

from engine import selftest
from engine.config import CacheType, EngineConfig
from engine.kernels import cpu
from engine.quality.invariants import KINDS, Round, Trial
from engine.selftest import main
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="there is no C compiler on this machine")

SUM_OF_WEIGHTS = "rows->sum[row] = sum_lanes(sum);"


def sum_in_another_order(most_queries: str) -> str:
    """The order of a sum follows the number of queries that are taken together."""
    return f"""
        rows->sum[row] = 0;
        for (int i = 0; i < WIDTH; i++) rows->sum[row] += sum[i / LANES][i % LANES];
        if (rows->size < {most_queries}) {SUM_OF_WEIGHTS}"""


BREAKS = {
    "int8_attention.c": (SUM_OF_WEIGHTS, sum_in_another_order("INT8_QUERIES")),
    "float_attention.c": (SUM_OF_WEIGHTS, sum_in_another_order("FLOAT_QUERIES")),
    # The order of two roundings follows the number of tokens.
    "matmul.c": (
        "(high_sum * 128.0f + low_sum) * token_scale * load(product->scale + n);",
        "num_panels == 1 ? (high_sum * 128.0f + low_sum) * token_scale * load(product->scale + n)"
        " : (high_sum * 128.0f + low_sum) * (token_scale * load(product->scale + n));",
    ),
}
"""In a C source, a line and what it is replaced by."""

CACHES: dict[str, CacheType] = {"float_attention.c": "bfloat16"}
"""What a source needs to be used at all."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("selftest") / "model"
    config = deepcopy(TINY_CONFIGS["llama"])
    config.max_position_embeddings = 512
    write_checkpoint(path, config)
    return path


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each source by its name, compiled: a library of which one is broken is soon built of the others."""
    loaded = cpu.library()
    assert loaded is not None
    directory = tmp_path_factory.mktemp("objects")
    command = [os.environ.get("CC", "cc"), *cpu.LEVELS[loaded.level].flags, *cpu.FLAGS, "-c"]
    subprocess.run([*command, *map(str, cpu.SOURCES)], cwd=directory, check=True)
    return {source.name: directory / f"{source.stem}.o" for source in cpu.SOURCES}


@pytest.fixture
def broken_kernels(
    request: pytest.FixtureRequest, objects: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The CPU's kernels with one of their sources broken."""
    line, replacement = BREAKS[request.param]
    for file in cpu.HEADERS:
        shutil.copy(file, tmp_path)
    (original,) = (file for file in cpu.SOURCES if file.name == request.param)
    assert original.read_text().count(line) == 1
    broken = tmp_path / request.param
    broken.write_text(original.read_text().replace(line, replacement))
    monkeypatch.setattr(
        cpu, "SOURCES", [broken if name == broken.name else objects[name] for name in objects]
    )
    monkeypatch.setattr(cpu, "HEADERS", sorted(tmp_path.glob("*.h")))
    # Pools are made by a library: those of the broken one must not serve the whole one, nor the other way around.
    monkeypatch.setattr(cpu, "_pools", {})
    cpu.library.cache_clear()
    assert cpu.library() is not None, "what is broken does not compile: other kernels would serve"
    yield
    cpu.library.cache_clear()


def trial(path: Path, num_requests: int = 24, cache: CacheType = "auto") -> Trial:
    config = EngineConfig(model=str(path), quant="int8", device="cpu", num_threads=2, kv_cache_dtype=cache)
    return Trial(config, path, num_requests)


@needs_compiler
@pytest.mark.usefixtures("broken_kernels")
@pytest.mark.parametrize(
    ("broken_kernels", "cache"),
    [(source, CACHES.get(source, "auto")) for source in BREAKS],
    indirect=["broken_kernels"],
)
def test_a_broken_reduction_is_found(checkpoint: Path, cache: CacheType) -> None:
    comparison = trial(checkpoint, cache=cache).run(quiet=True)
    assert comparison.missing() == []
    assert any("other logits alone" in difference for difference in comparison.differences)


@needs_compiler
def test_what_was_not_exercised_is_named(checkpoint: Path) -> None:
    comparison = trial(checkpoint, 2).run((Round(budget=400, max_num_seqs=2, is_scarce=False),), quiet=True)
    assert comparison.differences == []
    missing = comparison.missing()
    assert {"preemptions", "recomputed after a preemption", "step of 16 or more draws"} <= set(missing)
    assert "decoded" not in missing


@needs_compiler
def test_the_command_proves_it_and_says_how(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(checkpoint), "--quant", "int8", "--device", "cpu", "--num-threads", "2"]
    assert main(["--invariants", *options]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "PASS"
    assert "not exercised" not in shown
    assert "  ok   1 thread: " in shown
    assert all(kind in shown for kind in KINDS)


@needs_compiler
@pytest.mark.usefixtures("broken_kernels")
@pytest.mark.parametrize("broken_kernels", ["int8_attention.c"], indirect=True)
def test_the_command_fails_where_a_promise_is_broken(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "_compare_elsewhere", lambda trial, arguments: True)
    assert main(["--invariants", "--model", str(checkpoint), "--quant", "int8", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "FAIL"
    assert "other logits alone than computed with" in shown


@pytest.mark.parametrize("without", ["library", "float32"])
def test_where_nothing_is_promised_that_is_said(
    checkpoint: Path, without: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", str(checkpoint), "--device", "cpu", "--num-requests", "6"]
    if without == "library":
        monkeypatch.setattr(cpu, "library", lambda: None)
        options += ["--quant", "int8"]
    else:
        options += ["--dtype", "bfloat16"]
    assert main(["--invariants", *options]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "no promise is made for this configuration"
    assert "FAIL" not in shown


def test_an_option_that_does_not_fit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--invariants", "--model", "/nowhere/at/all"]) == 1
    assert "/nowhere/at/all" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--quant", "int8"])
