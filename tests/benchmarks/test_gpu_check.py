"""The command that checks and measures on a GPU, as far as it goes without one: its processes, its cases on the
meta device, the engine's timings on a CPU, and the page that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import end_to_end, kernels, matmul_cases, models, registry
from benchmarks.gpu.cases import Case, measure
from benchmarks.gpu.compilation import record_cases, record_engines
from benchmarks.gpu.end_to_end import Bench, end_to_end_steps
from benchmarks.gpu.kernels import OTHER_CASES, TARGET_CASES
from benchmarks.gpu.report import MAX_CHARACTERS, format_report, targets
from benchmarks.gpu.sections import ROOT, Section, run_sections
from benchmarks.gpu.steps import Result, Skipped, Step, within
from benchmarks.gpu.worker import run_step
from engine.kernels.launch import TARGETS

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "gpu-check: torch finds no GPU here; nothing was checked\n"


# Steps and their processes.


def test_a_step_passes_fails_or_is_skipped() -> None:
    def skip() -> dict[str, Any]:
        raise Skipped("no such package")

    def fail() -> dict[str, Any]:
        return within(torch.tensor([1.0, torch.nan]), torch.ones(2), 0.1)

    def crash() -> dict[str, Any]:
        raise KeyError("x")

    results = [run_step("s", Step("g", "n", run)) for run in (lambda: {"a": 1}, skip, fail, crash)]
    assert [(result.status, result.detail[:15]) for result in results] == [
        ("passed", ""),
        ("skipped", "no such package"),
        ("failed", "error is nan ti"),
        ("failed", "KeyError: 'x'"),
    ]


FAKE_WORKER = """
import os, sys, time
from benchmarks.gpu import worker
from benchmarks.gpu.steps import Step

def die(): os._exit(-11 & 0xFF)
def hang(): time.sleep(600)
plan = {
    "good": [Step("g", "a", dict), Step("g", "b", dict)],
    "dies": [Step("g", "a", dict), Step("g", "dies", die), Step("g", "c", dict)],
    "hangs": [Step("g", "a", dict), Step("g", "hangs", hang), Step("g", "c", dict)],
    "broken": None,
}
name, path, first = sys.argv[1:]
if plan[name] is None: sys.exit("cannot even start")
with open(path, "a") as file:
    sys.exit(worker.run_steps(name, plan[name], int(first), file))
"""


@pytest.fixture
def fake_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(self: Section, first: int) -> Any:
        command = [sys.executable, "-c", FAKE_WORKER, self.name, str(self.path), str(first)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with self.log.open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    monkeypatch.setattr(Section, "_launch", launch)


@pytest.mark.usefixtures("fake_worker")
def test_a_process_that_dies_is_started_again_behind_its_step(tmp_path: Path) -> None:
    results = run_sections(["good", "dies", "broken"], tmp_path, 2, time.monotonic() + 60, num_threads=1)
    found = [(result.section, result.name, result.status) for result in results]
    assert found == [
        ("good", "a", "passed"),
        ("good", "b", "passed"),
        ("dies", "a", "passed"),
        ("dies", "dies", "failed"),
        ("dies", "c", "passed"),
        ("broken", "start", "failed"),
    ]
    details = {result.name: result.detail for result in results}
    assert details["dies"].startswith("the process ended with status")
    assert details["start"] == "its process ended: cannot even start"


@pytest.mark.usefixtures("fake_worker")
def test_a_process_that_hangs_is_killed(tmp_path: Path) -> None:
    section = Section("hangs", tmp_path, 1)
    section.start()
    deadline = time.monotonic() + 60
    while '{"begin": 1}' not in section.path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not section.is_done()
    section.stop()
    found = [(result.name, result.status, result.detail) for result in section.results()]
    assert found == [
        ("a", "passed", ""),
        ("hangs", "not run", "out of time"),
        ("c", "not run", "out of time"),
    ]


@pytest.mark.usefixtures("fake_worker")
def test_what_was_never_started_is_not_run(tmp_path: Path) -> None:
    results = run_sections(["good"], tmp_path, 1, time.monotonic() - 1, num_threads=1)
    assert [(result.status, result.detail) for result in results] == [("not run", "out of time")]


def test_the_worker_runs_a_section_of_the_registry(tmp_path: Path) -> None:
    """Without a GPU each step fails by itself, with a reason."""
    section = Section("sampling", tmp_path, 1)
    section.start()
    deadline = time.monotonic() + 120
    while not section.is_done():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    results = section.results()
    assert len(results) == 16
    if not torch.cuda.is_available():
        assert {result.status for result in results} == {"failed"}
        assert all("Torch not compiled with CUDA" in r.detail or "NVIDIA" in r.detail for r in results)


def test_sections_have_steps_of_different_names() -> None:
    # Tensors are made when a step runs: the plan needs no GPU.
    for name, make in registry.SECTIONS.items():
        steps = make()
        names = [(step.group, step.name) for step in steps]
        assert steps
        assert len(set(names)) == len(names), name


def test_every_family_is_checked() -> None:
    from tests.helpers.tiny import TINY_CONFIGS

    assert {name for names in registry.FAMILIES for name in names} == set(TINY_CONFIGS)


# Timings.


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_what_is_timed_can_be_recorded_and_so_compiled_ahead(arch: str) -> None:
    makers = [
        make
        for key, make in {**TARGET_CASES, **OTHER_CASES}.items()
        if arch != "sm_80" or "fp8" not in key[1]
    ]
    names = {launch.name for launch in record_cases(TARGETS[arch], makers)}
    assert names >= {
        "_int4_segments_kernel",
        "_int4_large_kernel",
        "_int8_matmul_kernel",
        "_weight_only_kernel",
        "_paged_attention_kernel",
        "_rms_norm_kernel",
        "_gated_kernel",
        "_quantize_kernel",
        "_lookup_kernel",
        "_rotate_and_write_kernel",
        "_draw_kernel",
        "_threshold_kernel",
    }


def test_the_engines_that_are_timed_can_be_recorded() -> None:
    names = {launch.name for launch in record_engines(TARGETS["sm_90"])}
    assert names >= {"_int4_large_kernel", "_int8_matmul_kernel", "_paged_attention_kernel"}


def fake_timer(calls: Sequence[Callable[[], Any]]) -> float:
    for call in calls:
        call()
    return 1e-3


def test_cases_run_and_what_a_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: our bodies there, torch's, and libraries that are for GPUs only."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(matmul_cases, "num_copies", lambda num_bytes, device: 2)
    cases = kernels.int8_cases((64, 128), kernels.Int8Format(1), (1, 17), cpu)
    values = measure(cases, fake_timer)
    assert [set(row) - {"size", "bytes", "operations", "unit"} for row in values["rows"]] == [
        {"ours", "cuBLAS"},
        {"ours", "cuBLAS", "int_mm"},
    ]
    assert values["rows"][1]["bytes"] == 64 * 128 + 17 * (128 + 2 * 64)
    assert values["rows"][1]["operations"] == 2 * 17 * 64 * 128
    values = measure(kernels.int4_cases((64, 128), (1, 130), cpu, has_tinygemm=True), fake_timer)
    assert set(values["left out"]) == {"tinygemm"}
    assert "batch_invariant" in values["rows"][1]
    assert measure(kernels.weight_only_cases((64, 128), True, (1,), cpu), fake_timer)["left out"] == {}
    assert kernels.ceiling("copy", cpu, fake_timer, 64)["unit"] == "GB/s"
    assert kernels.ceiling("int8", cpu, fake_timer, 64) == {"value": 2 * 64**3 / 1e9, "unit": "TOP/s"}


def test_a_library_that_fails_does_not_hide_a_kernel_that_does() -> None:
    def broken() -> Any:
        raise RuntimeError("boom")

    good = Case(1, 1, 1, {"ours": lambda: [lambda: None], "cuBLAS": broken})
    assert measure([good], fake_timer)["left out"] == {"cuBLAS": "RuntimeError: boom"}
    with pytest.raises(RuntimeError, match="boom"):
        measure([Case(1, 1, 1, {"ours": broken})], fake_timer)


# The engine, on a CPU.


TINY_LLAMA = end_to_end.LLAMA_CONFIG | {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def tiny_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "LLAMA_CONFIG", TINY_LLAMA)
    monkeypatch.setattr(end_to_end.write_config, "__defaults__", (TINY_LLAMA,))
    for name, value in {
        "BATCHES": (1, 4),
        "PROMPT_TOKENS": 20,
        "PREFILL": (2, 30),
        "PROFILED_BATCH": 4,
    }.items():
        monkeypatch.setattr(end_to_end, name, value)


@pytest.mark.usefixtures("tiny_llama")
def test_end_to_end_on_a_cpu() -> None:
    options = {
        "device": "cpu",
        "kv_cache_memory": "8MiB",
        "max_model_len": 512,
        "num_threads": 1,
        "overlap": True,
    }
    steps = end_to_end_steps("int8", **options)
    results = {f"{step.group} {step.name}": run_step("engine int8", step) for step in steps}
    statuses = {name: (result.status, result.detail) for name, result in results.items()}
    assert statuses == {
        "start int8": ("passed", ""),
        "decode int8 batch 1": ("passed", ""),
        "decode int8 batch 4": ("passed", ""),
        "prefill int8": ("passed", ""),
        "outside kernels int8": ("skipped", "no CUDA graphs"),
        "switched off int8": ("failed", "assertion failed"),
        "compiled while serving int8": ("passed", ""),
    }
    decode = results["decode int8 batch 4"].values
    # 64 timed steps behind the prompt of 20, the first token and the warm-up.
    assert 20 + 8 + 32 <= decode["context"] <= 20 + 8 + 32 + 5
    layer = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 96
    weights = 2 * layer + 300 * 64
    keys = 4 * decode["context"] * 2 * 2 * 2 * (16 + 4)  # int8 codes and a scale
    assert 0 <= decode["bytes"] - weights - keys < 0.15 * weights  # scales and norms
    assert results["prefill int8"].values["weight operations"] == 2 * 2 * layer * 60


@pytest.mark.usefixtures("tiny_llama")
def test_a_request_that_stops_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"device": "cpu", "kv_cache_memory": "8MiB", "max_model_len": 512}
    bench = Bench(end_to_end.make_config(end_to_end.write_config(), "none", **options))
    bench.core.scheduler.eos_token_ids = frozenset(range(300))
    add = bench.add

    def stopping(*arguments: Any) -> dict[str, int]:
        monkeypatch.setattr(
            end_to_end, "SamplingParams", lambda **given: params(**{**given, "ignore_eos": False})
        )
        return add(*arguments)

    params = end_to_end.SamplingParams
    monkeypatch.setattr(bench, "add", stopping)
    with pytest.raises(AssertionError, match=r"stopped early|missing"):
        end_to_end.time_decode(bench, 1)


def test_an_engine_that_does_not_start_is_tried_once() -> None:
    steps = end_to_end_steps("none", device="cpu", max_model_len=10**9)
    results = [run_step("s", step) for step in steps]
    assert results[0].status == "failed"
    assert "max_model_len" in results[0].detail
    assert {(r.status, r.detail) for r in results[1:]} == {("skipped", "the engine did not start")}


# The checks of models, on the CPU's own executor.


def test_the_same_tokens_with_and_without_overlap() -> None:
    assert models._tokens("llama", "cpu", {"quant": "int8"})["tokens"] > 100


def test_graphs_that_change_a_logit_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert models._graphs("llama", "cpu", {"quant": "int8"}) == {}
    runs = iter((0.0, 1e-6))
    run = models.run_chunks

    def spoilt(*arguments: Any) -> models.Logits:
        shift = next(runs)
        return [{position: row + shift for position, row in rows.items()} for rows in run(*arguments)]

    monkeypatch.setattr(models, "run_chunks", spoilt)
    with pytest.raises(AssertionError, match="logits with graphs"):
        models._graphs("llama", "cpu", {"quant": "int8"})


def test_a_model_that_is_not_there_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "REAL_MODEL", "/no/such/model")
    result = run_step("real model", models.real_model_steps("cpu")[0])
    assert result.status == "skipped"
    assert "no such directory" in result.detail


# The page.


def measured(seconds: float = 1e-4) -> list[Result]:
    """A full result: every step of the registry, every number there, each longer than it will be."""
    results = [
        Result("kernels", "ceilings", name, "passed", values={"value": value, "unit": unit})
        for name, value, unit in (
            ("copy", 3012.3, "GB/s"),
            ("bf16", 789.1, "TFLOP/s"),
            ("int8", 1567.8, "TOP/s"),
        )
    ]
    for group, name in [*TARGET_CASES, *OTHER_CASES]:
        rows = []
        for size in _case_sizes(group):
            row = {"size": size, "bytes": 34_000_000, "operations": 10**9, "unit": "bf16", "ours": seconds}
            rows.append(row | dict.fromkeys((*_libraries(group), "batch_invariant"), 3 * seconds))
        results.append(Result("kernels", group, name, "passed", values={"rows": rows, "left out": {}}))
    for quant in end_to_end.QUANTS:
        section = f"engine {quant}"
        for batch in end_to_end.BATCHES:
            values = {"batch": batch, "step": 0.0067, "tok/s": batch / 0.0067, "bytes": 15 * 10**9}
            results.append(Result(section, "decode", f"{quant} batch {batch}", "passed", values=values))
        prefill = {"prompts": 8, "length": 2048, "seconds": 0.5, "tok/s": 32768.0}
        prefill |= {"weight operations": 2 * 10**14, "attention operations": 10**13}
        results.append(Result(section, "prefill", quant, "passed", values=prefill))
        outside = {"batch": 32, "step": 0.0071, "kernels": 0.0069, "forward": 0.007, "share": 0.028}
        results.append(Result(section, "outside kernels", quant, "passed", values=outside))
        rates = {"batch": 32, "no overlap": 4321.0, "eager": 3210.0, "eager, no overlap": 2100.0}
        results.append(Result(section, "switched off", quant, "passed", values=rates))
    return results


def _case_sizes(group: str) -> Sequence[int]:
    if "attention" in group or group == "FlexAttention":
        return (32, 1, 128)
    if group.startswith("int4"):
        return kernels.INT4_TOKENS
    if group.startswith("int8"):
        return kernels.INT8_TOKENS
    return (1, 32, 4096)


def _libraries(group: str) -> Sequence[str]:
    if "attention" in group:
        return ("SDPA flash", "SDPA cuDNN", "SDPA efficient")
    if group.startswith("int"):
        return ("cuBLAS", "tinygemm" if group.startswith("int4") else "int_mm")
    return ("torch",)


MACHINE = {
    "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB, 570.00"],
    "packages": {"torch": "2.11.0"},
    "date": "today",
}


def checks(status: Any, detail: str) -> list[Result]:
    return [
        Result(name, step.group, step.name, status, detail, values={"error": 0.5})
        for name, make in registry.CHECKS.items()
        for step in make()
    ]


def test_the_page_fits_at_its_worst() -> None:
    for status in ("passed", "failed", "skipped", "not run"):
        page = format_report([*checks(status, "a long reason " * 50), *measured()], MACHINE, 470.0)
        assert len(page) <= MAX_CHARACTERS < 10_000
        assert "int4 g128 8192x8192" in page
    whole = format_report([*checks("passed", ""), *measured()], MACHINE, 470.0)
    assert "cut" not in whole
    different = [Result("s", "g", str(i), "skipped", f"{i} reason " * 40) for i in range(100)]
    page = format_report([*checks("failed", "x" * 1000), *different, *measured()], MACHINE, 470.0)
    assert len(page) <= MAX_CHARACTERS
    assert "more; see the JSON" in page


def test_the_page_of_nothing() -> None:
    assert "not measured" in format_report([], {}, 1.0)


def test_targets_say_met_or_missed() -> None:
    found = {target.name: target for target in targets(measured())}
    assert len(found) == 13
    assert found["int4 8192x8192 M 1-16 / cuBLAS bf16"].is_met
    assert found["int4 8192x8192 M 1-16 / cuBLAS bf16"].measured == "3.00x"
    decode = found["decode attention 8K batch 32 / copy bandwidth"]
    assert (decode.is_met, decode.measured) == (False, "11%")
    assert found["8B bf16 batch 1 decode (75% of 223)"].is_met is False
    assert found["8B bf16 batch 1 decode (75% of 223)"].measured == "149 tok/s"
    assert found["8B int4 batch 32, outside kernels"].is_met
    assert all(target.is_met is None for target in targets([]))


def test_results_are_json() -> None:
    json.dumps([result.values for result in measured()])
