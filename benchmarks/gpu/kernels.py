"""What is timed: the card's ceilings, and the kernels beside the library calls that a user would otherwise make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.gpu.attention_cases import decode_cases, flex_cases, prefill_cases
from benchmarks.gpu.cases import Case, measure
from benchmarks.gpu.matmul_cases import int4_cases, int8_cases, weight_only_cases
from benchmarks.gpu.row_cases import row_cases, sample_cases
from benchmarks.gpu.steps import Step, Values
from benchmarks.gpu.timing import Timer
from engine.kernels.operands import Int8Format

BF16 = torch.bfloat16

SQUARE = (8192, 8192)
LLAMA_SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(N, K) of Llama-3.1-8B's layers."""

INT4_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
INT8_TOKENS = (1, 16, 64, 1024, 4096)


def ceiling(kind: str, device: torch.device, timer: Timer, size: int = 8192) -> Values:
    """GB/s copied (read and written), or TFLOP/s (TOP/s) of a square product."""
    if kind == "copy":
        count = 16 * size * size
        source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
        seconds = timer([partial(target.copy_, source)])
        return {"value": 2 * count / seconds / 1e9, "unit": "GB/s"}
    if kind == "bf16":
        x, y = (torch.randn(size, size, dtype=BF16, device=device) for _ in range(2))
        seconds = timer([partial(torch.mm, x, y.t())])
    else:
        x, y = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
        seconds = timer([partial(torch._int_mm, x, y.t())])
    return {"value": 2 * size**3 / seconds / 1e12, "unit": "TFLOP/s" if kind == "bf16" else "TOP/s"}


CaseMaker = Callable[[torch.device], list[Case]]

TARGET_CASES: dict[tuple[str, str], CaseMaker] = {
    ("int4 g128", "8192x8192"): lambda device: int4_cases(SQUARE, INT4_TOKENS, device, has_tinygemm=True),
    ("int8 one term", "8192x8192"): lambda device: int8_cases(SQUARE, Int8Format(1), INT8_TOKENS, device),
    ("decode attention 8K", "kv bf16"): lambda device: decode_cases((32, 1, 128), 8192, BF16, device),
    ("prefill attention 4K", "causal"): lambda device: prefill_cases((1, 4), 4096, device),
}
"""By group and name: what the targets are about."""

OTHER_CASES: dict[tuple[str, str], CaseMaker] = {
    ("int8 two terms", "8192x8192"): lambda device: int8_cases(SQUARE, Int8Format(2), INT8_TOKENS, device),
    ("int8 one term g128", "8192x8192"): lambda device: int8_cases(
        SQUARE, Int8Format(1, 128), INT8_TOKENS, device
    ),
    ("int8 two terms g128", "8192x8192"): lambda device: int8_cases(
        SQUARE, Int8Format(2, 128), INT8_TOKENS, device
    ),
    **{
        ("int4 g128", f"{name} {shape[0]}x{shape[1]}"): partial(int4_cases, shape, INT4_TOKENS)
        for name, shape in LLAMA_SHAPES.items()
    },
    ("decode attention 8K", "kv int8"): lambda device: decode_cases((32,), 8192, torch.int8, device, False),
    ("decode attention 8K", "kv fp8"): lambda device: decode_cases(
        (32,), 8192, torch.float8_e4m3fn, device, False
    ),
    ("weight-only int8", "8192x8192"): lambda device: weight_only_cases(
        SQUARE, True, (1, 16, 64, 1024), device
    ),
    ("pinned bf16", "8192x8192"): lambda device: weight_only_cases(SQUARE, False, (1, 16, 64, 1024), device),
    **{
        ("rows", kind): partial(row_cases, kind, (1, 32, 4096))
        for kind in (
            "rms_norm",
            "rms_norm int8",
            "silu_mul",
            "silu_mul int8",
            "quantize",
            "embedding",
            "rotary",
        )
    },
    **{
        ("sample", kind): partial(sample_cases, kind, (1, 32))
        for kind in ("greedy", "draw", "top_k", "top_p")
    },
    **{
        ("int8 one term", f"{name} {LLAMA_SHAPES[name][0]}x{LLAMA_SHAPES[name][1]}"): partial(
            int8_cases, LLAMA_SHAPES[name], Int8Format(1), INT8_TOKENS
        )
        for name in ("gate_up", "down")
    },
    ("FlexAttention", "decode 8K"): lambda device: flex_cases(32, 8192, 1, device),
    ("FlexAttention", "prefill 4K"): lambda device: flex_cases(1, 4096, 4096, device),
}


def ceiling_steps(device: torch.device, timer: Timer) -> list[Step]:
    """What the card can do."""
    return [
        Step("ceilings", kind, partial(ceiling, kind, device, timer)) for kind in ("copy", "bf16", "int8")
    ]


def kernel_steps(
    makers: Mapping[tuple[str, str], CaseMaker], device: torch.device, timer: Timer
) -> list[Step]:
    """A step for each kernel and shape, over its numbers of tokens."""

    def run(make: CaseMaker) -> Values:
        return measure(make(device), timer)

    return [Step(group, name, partial(run, make)) for (group, name), make in makers.items()]
