"""The checks of `benchmarks/gpu_check.py` on small tensors: they pass here, and fail for a kernel that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import matmuls, models, row_operations, sampling
from benchmarks.gpu.attention import Variant, attention_steps
from benchmarks.gpu.matmuls import Sizes
from benchmarks.gpu.paged import Heads
from benchmarks.gpu.steps import Result, Step
from benchmarks.gpu.worker import run_step
from engine.kernels import launch
from engine.kernels.operands import Int8Activations, Int8Format
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

CPU = torch.device("cpu")
FP16 = torch.float16
SIZES = Sizes(
    CPU,
    even=(16, 1100),
    odd=(20, 140),
    exact=(20, 160),
    tokens=(1, 17),
    odd_tokens=(3,),
    batches=(1, 3, 17),
)
HEADS = Heads(4, 2, 16, FP16, FP16)
LENGTHS = [(5, 1), (0, 20), (0, 0), (530, 1), (30, 60)]


def run(steps: list[Step], *wanted: str) -> list[Result]:
    """The results of the steps whose group or name is wanted."""
    results = [run_step("test", step) for step in steps if {step.group, step.name} & set(wanted)]
    assert results
    return results


def passes(steps: list[Step], *wanted: str) -> bool:
    results = run(steps, *wanted)
    assert {result.status for result in results} <= {"passed", "failed"}
    return all(result.status == "passed" for result in results)


def test_matmuls() -> None:
    assert passes(matmuls.int4_steps(FP16, SIZES), "g128 odd fp16", "g32 odd fp16", "large g128 fp16")
    int8 = matmuls.int8_steps(FP16, SIZES)
    assert passes(int8, f"{Int8Format(1)} fp16", f"{Int8Format(2, 32)} fp16")
    assert passes(matmuls.int8_steps(torch.bfloat16, SIZES), str(Int8Format(2)))
    assert passes(matmuls.weight_only_steps(SIZES), "int8 g128 fp16", "float fp16", "fp16", "float")


def test_row_operations() -> None:
    steps = row_operations.row_steps(CPU, (70,), 8, {"fp16": FP16}, {"fp16": FP16, "int8": torch.int8})
    results = [run_step("test", step) for step in steps]
    assert [(result.name, result.detail) for result in results if result.status != "passed"] == []


@pytest.mark.parametrize(
    "variant", [Variant(HEADS), Variant(Heads(4, 2, 16, FP16, torch.int8), batch_invariant=True)]
)
def test_attention(variant: Variant) -> None:
    steps = attention_steps(CPU, [variant], LENGTHS)
    assert [run_step("test", step).status for step in steps] == ["passed"] * (
        3 if variant.batch_invariant else 2
    )


def test_sampling() -> None:
    steps = sampling.sampling_steps(CPU, (300,), 6)
    assert passes(steps, "adjust 300", "log-probabilities 300", "filters normal 300", "draw tied 300")


def broken_by(change: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    """A function that spoils what another returns."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            change(result.high if isinstance(result, Int8Activations) else result)
            return result

        return call

    return wrap


def one_element(x: torch.Tensor) -> None:
    x.view(-1)[0] += 1


@pytest.mark.parametrize(
    ("module", "name", "steps", "wanted"),
    [
        (matmuls, "int4_large", lambda: matmuls.int4_steps(FP16, SIZES), "g128 odd fp16"),
        (matmuls, "int4_segments", lambda: matmuls.int4_steps(FP16, SIZES), "g128 odd fp16"),
        (
            matmuls,
            "int8_matmul",
            lambda: matmuls.int8_steps(torch.bfloat16, SIZES)[-4:-3],
            "int8 rows",
        ),
        (row_operations, "silu_mul", lambda: row_operations.row_steps(CPU, (70,), 8), "fp16 70"),
        (
            sampling,
            "find_thresholds",
            lambda: sampling.sampling_steps(CPU, (300,)),
            "filters normal 300",
        ),
    ],
)
def test_a_wrong_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, steps: Callable[[], list[Step]], wanted: str
) -> None:
    chosen = [step for step in steps() if wanted in (step.group, step.name) and "quant" not in step.group]
    chosen = [
        step for step in chosen if name.split("_")[0] in step.group or step.group in ("sample", "int8 rows")
    ]
    monkeypatch.setattr(module, name, broken_by(one_element)(getattr(module, name)))
    assert [run_step("test", step).status for step in chosen] == ["failed"] * len(chosen) != []


def test_attention_of_a_wrong_window_fails() -> None:
    heads = Variant(HEADS, window=7)
    step = attention_steps(CPU, [heads], [(5, 1), (40, 20)])[0]
    assert run_step("test", step).status == "passed"
    from benchmarks.gpu.attention import attend, expect, make_sequences, within

    sequences = make_sequences([(40, 20)], HEADS, CPU)
    with pytest.raises(AssertionError, match="times its bound"):
        within(attend(sequences, 7), expect(sequences, 8), 2**-8)


def test_a_tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The device executor under the interpreter against the host's; wrong logits fail."""
    monkeypatch.setattr(models, "CHUNKS", [[5, 1, 1], [1, 6], [3]])
    with monkeypatch.context() as patch:
        patch.setattr(launch, "INTERPRETS", False)
        models._cpu_logits("qwen2", "none")
    step = models.family_steps(["qwen2"], "cpu")[1]
    assert step.name == "qwen2 float32 none"
    result = run_step("test", step)
    assert (result.status, result.detail) == ("passed", "")
    expected = models._cpu_logits("qwen2", "none")
    with pytest.raises(AssertionError, match="logits are off"):
        models.compare(expected + torch.randn_like(expected) * 0.1, expected, 0.01)
    write_checkpoint(tmp_path / "other", TINY_CONFIGS["qwen2"], seed=1)
    monkeypatch.setattr(models, "checkpoint", lambda name: tmp_path / "other")
    assert run_step("test", step).status == "failed"
