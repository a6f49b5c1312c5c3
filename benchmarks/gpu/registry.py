"""The sections of the check, each of which runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.attention import VARIANTS, attention_steps
from benchmarks.gpu.compilation import compilation_steps
from benchmarks.gpu.end_to_end import QUANTS, end_to_end_steps
from benchmarks.gpu.kernels import OTHER_CASES, TARGET_CASES, ceiling_steps, kernel_steps
from benchmarks.gpu.matmuls import Sizes, int4_steps, int8_steps, weight_only_steps
from benchmarks.gpu.models import engine_steps, family_steps, real_model_steps
from benchmarks.gpu.row_operations import row_steps
from benchmarks.gpu.sampling import sampling_steps
from benchmarks.gpu.steps import Step
from benchmarks.gpu.timing import time_on_gpu

GPU = torch.device("cuda", 0)

FAMILIES = (
    ("llama", "llama-llama3", "llama-linear"),
    ("gemma3", "mistral", "llama-yarn"),
    ("qwen2", "qwen3", "smollm2"),
    ("qwen2-sliding", "llama-biases"),
)

CHECKS: dict[str, Callable[[], list[Step]]] = {
    "compilation": compilation_steps,
    "int4 bf16": lambda: int4_steps(torch.bfloat16, Sizes(GPU)),
    "int8 bf16": lambda: int8_steps(torch.bfloat16, Sizes(GPU)),
    "attention": lambda: attention_steps(GPU, VARIANTS[::2]),
    "more attention": lambda: attention_steps(GPU, VARIANTS[1::2]),
    "graphs and overlap": lambda: engine_steps("cuda"),
    **{f"models {i + 1}": partial(family_steps, names, "cuda") for i, names in enumerate(FAMILIES)},
    "weight-only": lambda: weight_only_steps(Sizes(GPU)),
    "row operations": lambda: row_steps(GPU),
    "sampling": lambda: sampling_steps(GPU),
    "int4 fp16": lambda: int4_steps(torch.float16, Sizes(GPU)),
    "int8 fp16": lambda: int8_steps(torch.float16, Sizes(GPU)),
    "real model": lambda: real_model_steps("cuda"),
}
"""What passes or fails; several run at a time."""

TARGET_TIMINGS: dict[str, Callable[[], list[Step]]] = {
    "kernels": lambda: [
        *ceiling_steps(GPU, time_on_gpu),
        *kernel_steps(TARGET_CASES, GPU, time_on_gpu),
    ],
    **{f"engine {quant}": partial(end_to_end_steps, quant) for quant in QUANTS},
}
"""What the targets are about; each has the GPU to itself."""

OTHER_TIMINGS: dict[str, Callable[[], list[Step]]] = {
    "more kernels": lambda: kernel_steps(OTHER_CASES, GPU, time_on_gpu),
}
"""The rest, as far as there is time."""

SECTIONS = CHECKS | TARGET_TIMINGS | OTHER_TIMINGS
