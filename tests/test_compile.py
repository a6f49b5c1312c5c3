"""Every tile of every operation compiles for its chip without spills; what does not, is reported.

All of it runs without a GPU. `make test` compiles what an engine launches for Llama-3.1-8B under int8 and int4 on
sm_90 and gfx942; `make test-all` every tile, chip, model and option. Kernels are recorded and compiled in processes
of their own, which know nothing of a TRITON_INTERPRET around the tests.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import triton
import triton.language as tl

from engine.compile import main
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.warmup import record_launches
from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.attention.dispatch import paged_attention
from engine.kernels.attention.in_triton import TritonPlan, WorkList, make_scratch
from engine.kernels.attention.kv_layer import INT4, KVCache, KVLayer
from engine.kernels.compilation import (
    CompiledLaunch,
    PortableLaunch,
    compile_launch,
    gpu_target,
    problems,
    resources_of,
)
from engine.kernels.embedding import lookup
from engine.kernels.launch import (
    TARGETS,
    TILES_DIRECTORY,
    CompilationCounter,
    Launch,
    Tile,
    launch,
    recording,
    tiles,
)
from engine.kernels.matmul.blocks_triton import BlockMatmul, block_rows
from engine.kernels.matmul.codebook import SCALE_SIZE
from engine.kernels.matmul.codebook_triton import CodebookMatmul
from engine.kernels.matmul.group_sums_triton import group_sums
from engine.kernels.matmul.int4 import Int4Matmul
from engine.kernels.matmul.int8 import Int8Matmul
from engine.kernels.matmul.sparse24 import SparseCodes
from engine.kernels.matmul.weight_only import WeightOnlyMatmul
from engine.kernels.norm import rms_norm
from engine.kernels.operands import Int8Format, SumsFormat
from engine.kernels.quantize import quantize_per_token
from engine.kernels.quantize_triton import write_in_triton
from engine.kernels.rotary import rotate_and_write
from engine.kernels.sample import (
    Adjustments,
    DrawParameters,
    adjust_logits,
    draw_tokens,
    logprobs_of,
    mask_logits,
)
from engine.quant.block_weight import BLOCK_TYPES
from tests.conftest import COMPILED

SAMPLE = ("sm_90", "gfx942")


@pytest.fixture(scope="module")
def compiler() -> Iterator[Executor]:
    """Processes that compile; Triton's disk cache goes by source, version, chip and options, and outlives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        if "TRITON_CACHE_DIR" not in os.environ:
            patch.setenv("TRITON_CACHE_DIR", str(COMPILED / "triton"))
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
            yield pool


# The check itself, on kernels that are made for it.


@triton.jit(do_not_specialize=["num_rows"])
def _center_kernel(x, bias, out, num_rows, stride, step, BLOCK: tl.constexpr):
    """A row less its maximum: all of the row is held in registers."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + columns * step, mask=row < num_rows, other=0.0)
    if bias is not None:
        values += tl.load(bias + columns)
    tl.store(out + row * stride + columns * step, values - tl.max(values, 0), mask=row < num_rows)


@triton.jit
def _product_kernel(x, y, out, K, BLOCK: tl.constexpr):
    """[BLOCK, K] times [K, BLOCK], in tiles that are staged in shared memory."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        sums = tl.dot(tl.load(x + rows * K + k + columns), tl.load(y + (k + rows) * BLOCK + columns), sums)
    tl.store(out + rows * BLOCK + columns, sums)


@triton.jit
def _broken_kernel(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 16, "too small a block")
    tl.store(x + tl.arange(0, BLOCK), 0.0)


def center_arguments(device: str, bias: bool = False) -> dict[str, Any]:
    x = torch.empty(16, 64, device=device)
    return {"x": x, "bias": x if bias else None, "out": x, "num_rows": 16, "stride": 64, "step": 1}


def record_center(block: int, num_warps: int, bias: bool = False) -> Launch:
    with recording(TARGETS["sm_90"]) as launches:
        launch(_center_kernel, (1,), center_arguments("meta", bias), Tile({"BLOCK": block}, num_warps, 1))
    (only,) = launches
    return only


def compile_center(arch: str, block: int, num_warps: int, bias: bool = False) -> CompiledLaunch:
    return compile_launch(record_center(block, num_warps, bias), arch)


def compile_product(arch: str, block: int, num_stages: int) -> CompiledLaunch:
    x = torch.empty(block, 16 * block, dtype=torch.float16, device="meta")
    arguments = {"x": x, "y": x, "out": x.float(), "K": x.shape[1]}
    with recording(TARGETS[arch]) as launches:
        launch(_product_kernel, (1,), arguments, Tile({"BLOCK": block}, 8, num_stages))
    (only,) = launches
    return compile_launch(only, arch)


def spilling_block(arch: str) -> int:
    """Numbers in a row that one warp cannot hold: 256 registers a thread of 255, on AMD 512 of 512."""
    return 8192 if TARGETS[arch].is_nvidia else 32768


def chips(*sample: str) -> list[Any]:
    """All chips; those outside the sample are slow."""
    return [pytest.param(arch, marks=[] if arch in sample else pytest.mark.slow) for arch in TARGETS]


@pytest.mark.parametrize("arch", chips(*SAMPLE))
def test_a_spill_is_a_problem(compiler: Executor, arch: str) -> None:
    compiled = compiler.submit(compile_center, arch, spilling_block(arch), 1).result()
    resources = resources_of(compiled)
    assert resources.spills > 0
    assert resources.stack_bytes > 0
    (problem,) = problems(compiled)
    assert problem.startswith(f"spills: {resources.spills}, {resources.stack_bytes} bytes")


@pytest.mark.parametrize("arch", chips(*SAMPLE))
def test_a_kernel_without_spills_has_no_problems(compiler: Executor, arch: str) -> None:
    compiled = compiler.submit(compile_center, arch, spilling_block(arch), 16).result()
    assert problems(compiled) == []
    resources = resources_of(compiled)
    # Each thread holds its part of the row, and reads it in loads of four floats.
    lanes = 16 * gpu_target(arch).warp_size
    values = spilling_block(arch) // lanes
    assert values <= resources.registers <= 255
    assert (resources.wide_loads, resources.narrow_loads) == (values // 4, 0)
    assert resources.matrix_instructions == resources.tensor_memory == 0


@pytest.mark.parametrize("arch", chips(*SAMPLE))
def test_instructions_of_a_matrix_product_are_counted(compiler: Executor, arch: str) -> None:
    resources = resources_of(compiler.submit(compile_product, arch, 64, 2).result())
    assert resources.matrix_instructions > 0
    assert resources.wide_loads > 0
    assert (resources.tensor_memory > 0) == (arch == "sm_100")
    # Two operands of 64 × 64 halves in flight; AMD stages through registers and holds one of them.
    assert resources.shared_bytes >= 2 * 64 * 64 * 2


@pytest.mark.parametrize("arch", chips("sm_90"))
def test_too_much_shared_memory_is_a_problem(compiler: Executor, arch: str) -> None:
    num_stages = 6 if TARGETS[arch].is_nvidia else 3
    compiled = compiler.submit(compile_product, arch, 128, num_stages).result()
    (problem,) = [problem for problem in problems(compiled) if problem.startswith("shared memory")]
    assert f"{compiled.shared_bytes / 1024:.1f} KiB" in problem


class FakeDriver:
    """Stands for a GPU's driver, as far as Triton asks it before a launch."""

    def __init__(self, arch: str) -> None:
        self.target = gpu_target(arch)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def keys_of_center(arch: str, bias: bool) -> tuple[str, str]:
    """The disk cache's key of a compiled launch, and of the launch itself where the chip is there."""
    compiled = compile_launch(record_center(1024, 4, bias), arch)
    _center_kernel.device_caches.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", FakeDriver(arch))
        launched = _center_kernel.run(
            **center_arguments("cpu", bias),
            BLOCK=1024,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=False,
            grid=(1,),
            warmup=True,
        )
    return compiled.key, launched.hash


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("arch", chips(*SAMPLE))
def test_a_launch_finds_what_was_compiled_ahead(compiler: Executor, arch: str, bias: bool) -> None:
    """With None or a tensor, an integer that is 1, one that is a multiple of 16 and an unspecialized one."""
    compiled, launched = compiler.submit(keys_of_center, arch, bias).result()
    assert compiled == launched


def count_compilations(arch: str) -> list[int]:
    """What the counter shows after each of three launches, of which the last repeats the second."""
    counter = CompilationCounter(TARGETS[arch])
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", FakeDriver(arch))
        _center_kernel.device_caches.clear()
        for block in (512, 2048, 2048):
            options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
            _center_kernel.run(**center_arguments("cpu"), BLOCK=block, **options, grid=(1,), warmup=True)
            counts.append(counter.count)
    return counts


def test_a_compilation_is_counted_and_a_launch_that_is_known_is_not(compiler: Executor) -> None:
    assert compiler.submit(count_compilations, "sm_90").result() == [1, 2, 2]


# The command.


def record_for_command(names: list[str]) -> list[PortableLaunch]:
    x = torch.empty(16, 64, device="meta")
    with recording(TARGETS["sm_90"]) as launches:
        if "broken" in names:
            launch(_broken_kernel, (1,), {"x": x}, Tile({"BLOCK": 16}, 4, 1))
        if "clean" in names:
            launch(_center_kernel, (1,), center_arguments("meta"), Tile({"BLOCK": 1024}, 4, 1))
        if "spilling" in names:
            launch(_center_kernel, (1,), center_arguments("meta"), Tile({"BLOCK": 8192}, 1, 1))
    return [PortableLaunch.of(one) for one in launches]


@pytest.fixture
def launches_of_a_model(compiler: Executor, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Makes the engine launch the kernels that are named."""

    def launch_these(names: list[str]) -> None:
        recorded = {one.restore() for one in compiler.submit(record_for_command, names).result()}
        monkeypatch.setattr("engine.compile.record_launches", lambda config, arch: recorded)

    return launch_these


def test_the_command_ends_with_1_and_the_problems(
    launches_of_a_model: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    launches_of_a_model(["broken", "clean", "spilling"])
    file = tmp_path / "report.json"
    assert main(["--arch", "sm_90", "--model", "any", "--jobs", "2", "--json", str(file)]) == 1
    output = capsys.readouterr().out
    table, listed = output.split("kernels: 3 for sm_90")
    assert len(table.splitlines()) == 4
    assert "_center_kernel BLOCK=1024 num_warps=4" in table
    assert "problems: 2" in listed
    assert "too small a block" in listed
    assert "_center_kernel (x=*fp32" in listed
    assert "spills: " in listed
    kernels = json.loads(file.read_text())["kernels"]
    assert [len(kernel["problems"]) for kernel in kernels] == [1, 0, 1]
    assert kernels[0]["resources"] is None
    assert kernels[1]["resources"]["spills"] == 0


def test_the_command_ends_with_0_without_problems(
    launches_of_a_model: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    launches_of_a_model(["clean"])
    assert main(["--arch", "sm_90", "--model", "any", "--jobs", "1"]) == 0
    assert "kernels: 1 for sm_90" in capsys.readouterr().out


def test_the_command_refuses_an_unknown_chip(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--arch", "sm_70", "--model", "llama"])
    assert exit.value.code == 2
    assert "sm_70" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_refuses_an_unknown_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["--arch", "sm_90", "--model", "/no/such/model"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ModelNotFoundError: /no/such/model")


def test_the_command_refuses_an_option_that_the_engine_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["--arch", "sm_90", "--model", "llama", "--quant", "int5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "quant: must be one of" in line


def test_the_command_refuses_the_interpreter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--arch", "sm_90", "--model", "llama"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "ConfigError: TRITON_INTERPRET=1 replaces the compiler: unset it to compile kernels"


def test_an_unknown_chip_is_refused() -> None:
    with pytest.raises(ConfigError, match="sm_70"):
        compile_launch(None, "sm_70")  # type: ignore[arg-type]


# The matrix: every tile of every operation on every chip, with the shapes of a few models.


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a model that its kernels depend on."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    sliding_window: int | None = None

    @property
    def products(self) -> list[tuple[int, int]]:
        """(N, K) of each linear layer: query, key and value; output; gate and up; down."""
        query = self.heads * self.head_dim
        return [
            (query + 2 * self.kv_heads * self.head_dim, self.hidden),
            (self.hidden, query),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]


LLAMA = Shape("llama-3.1-8b", 4096, 32, 8, 128, 14336, 128256)
SHAPES = (
    LLAMA,
    Shape("smollm2-135m", 576, 9, 3, 64, 1536, 49152),
    Shape("gemma-3-270m", 640, 4, 1, 256, 2048, 262144, sliding_window=512),
)

GROUP_SIZES: tuple[Literal[32, 64, 128], ...] = (32, 64, 128)
ROTATED = SumsFormat(is_rotated=True)
FORMATS = (None, Int8Format(1), Int8Format(2), Int8Format(2, 128), SumsFormat(), ROTATED)

Operation = Callable[[Shape, int], None]


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def call_norm(shape: Shape, num_tokens: int) -> None:
    x, weight = empty(num_tokens, shape.hidden), empty(shape.hidden)
    for format in FORMATS:
        rms_norm(x, weight, 1e-5, format)
        rms_norm(x, weight, 1e-5, format, delta=x)
    # The norm of queries and keys: heads of a stack.
    size = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    heads = empty(num_tokens, size).view(num_tokens, -1, shape.head_dim)
    rms_norm(heads[:, : shape.heads], empty(shape.head_dim), 1e-5)


def call_quantize(shape: Shape, num_tokens: int) -> None:
    for columns in (shape.hidden, shape.heads * shape.head_dim, shape.intermediate):
        for format in FORMATS:
            if isinstance(format, Int8Format):
                quantize_per_token(empty(num_tokens, columns), format)
        write_in_triton(empty(num_tokens, columns), ROTATED)


def call_activation(shape: Shape, num_tokens: int) -> None:
    for format in FORMATS:
        silu_mul(empty(num_tokens, 2 * shape.intermediate), format)
        gelu_mul(empty(num_tokens, 2 * shape.intermediate), format)


def call_embedding(shape: Shape, num_tokens: int) -> None:
    token_ids = empty(num_tokens, dtype=torch.int32)
    lookup(token_ids, empty(shape.vocab, shape.hidden), None, None, torch.bfloat16)
    codes = empty(shape.vocab, shape.hidden, dtype=torch.int8)
    for group_size in (None, 32):
        num_scales = () if group_size is None else (-(-shape.hidden // group_size),)
        lookup(
            token_ids, codes, empty(shape.vocab, *num_scales, dtype=torch.float32), group_size, torch.bfloat16
        )
    for block_type in BLOCK_TYPES.values():
        weight = block_type.grouped(block_type.parts(shape.vocab, shape.hidden), shape.hidden)
        block_rows(token_ids, BlockMatmul(weight, None), torch.bfloat16)


def call_group_sums(shape: Shape, num_tokens: int) -> None:
    for _, in_features in shape.products:
        group_sums(empty(num_tokens, in_features))


def call_adjust(shape: Shape, num_tokens: int) -> None:
    rows, token_ids = empty(2, num_tokens, dtype=torch.int32)
    bias, repetition, subtract = empty(3, num_tokens, dtype=torch.float32)
    entries = Adjustments(rows, token_ids, bias, repetition, subtract)
    logits = empty(num_tokens, shape.vocab, dtype=torch.float32)
    mask_logits(logits, empty(num_tokens, -(-shape.vocab // 32), dtype=torch.int32))
    adjust_logits(logits, entries)


def call_draw(shape: Shape, num_tokens: int) -> None:
    logits = empty(num_tokens, shape.vocab, dtype=torch.float32)
    integers, floats = empty(num_tokens, dtype=torch.int32), empty(num_tokens, dtype=torch.float32)
    parameters = DrawParameters(integers, integers, floats, integers, floats, floats)
    for filters in (False, True):
        draw_tokens(logits, parameters, filters=filters)
        draw_tokens(logits, parameters, filters=filters, last_tokens=integers, table_rows=integers)
    logprobs_of(logits, integers, [1] * num_tokens)


def call_int4(shape: Shape, num_tokens: int) -> None:
    for group_size in (32, 64, 128):
        for out_features, in_features in shape.products[1:]:
            codes = empty(out_features, in_features // 2, dtype=torch.uint8)
            scale = empty(out_features, -(-in_features // group_size), dtype=torch.float16)
            for batch_invariant in (False, True):
                Int4Matmul(codes, scale, scale, group_size, None, batch_invariant)(
                    empty(num_tokens, in_features)
                )


def call_blocks(shape: Shape, num_tokens: int) -> None:
    for out_features, in_features in shape.products[1:]:
        for block_type in BLOCK_TYPES.values():
            if in_features % (block_type.block_size or 1) == 0:
                weight = block_type.grouped(block_type.parts(out_features, in_features), in_features)
                BlockMatmul(weight, None)(empty(num_tokens, in_features))


def call_codebook(shape: Shape, num_tokens: int) -> None:
    for out_features, in_features in shape.products[1:]:
        x, codes = empty(num_tokens, in_features), empty(out_features, in_features // 2, dtype=torch.uint8)
        scale = empty(out_features, -(-in_features // SCALE_SIZE), dtype=torch.float32)
        CodebookMatmul(codes, empty(1, 16, dtype=torch.float32), scale)(x)
        CodebookMatmul(codes, empty(out_features, 16, dtype=torch.float16))(x)


def call_int8(shape: Shape, num_tokens: int) -> None:
    formats = [Int8Format(1), Int8Format(2), Int8Format(1, 32), Int8Format(2, 64), Int8Format(2, 128)]
    for format in formats:
        for out_features, in_features in shape.products[1:]:
            weight = empty(out_features, in_features, dtype=torch.int8)
            groups = () if format.group_size is None else (-(-in_features // format.group_size),)
            for scale in {(), groups}:
                matmul = Int8Matmul(weight, empty(out_features, *scale, dtype=torch.float32), None, format)
                matmul(empty(num_tokens, in_features))


def call_sparse24(shape: Shape, num_tokens: int) -> None:
    for out_features, in_features in shape.products[1:]:
        x, masks = empty(num_tokens, in_features), empty(out_features, in_features // 8, dtype=torch.uint8)
        kept = empty(out_features, in_features // 2, dtype=torch.int8)
        scale = empty(out_features, dtype=torch.float32)
        for format in (Int8Format(1), Int8Format(2)):
            Int8Matmul(SparseCodes(kept, masks), scale, None, format)(x)
        codes = SparseCodes(empty(out_features, in_features // 4, dtype=torch.uint8), masks)
        for group_size in (32, 64, 128):
            scale = empty(out_features, -(-in_features // group_size), dtype=torch.float16)
            for batch_invariant in (False, True):
                # The form for many tokens is not that of few.
                for rows in {num_tokens, 4096}:
                    matmul = Int4Matmul(codes, scale, None, group_size, None, batch_invariant)
                    matmul(empty(rows, in_features))


def call_weight_only(shape: Shape, num_tokens: int) -> None:
    for out_features, in_features in shape.products[1:]:
        x = empty(num_tokens, in_features)
        WeightOnlyMatmul(empty(out_features, in_features))(x)
        weight = empty(out_features, in_features, dtype=torch.int8)
        WeightOnlyMatmul(weight, empty(out_features, dtype=torch.float32))(x)
        for group_size in GROUP_SIZES:
            scale = empty(out_features, -(-in_features // group_size), dtype=torch.float32)
            WeightOnlyMatmul(weight, scale, group_size)(x)


def cache_layer(kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVLayer:
    return KVCache.allocate(1, 4096, 16, kv_heads, head_dim, dtype, torch.device("meta")).layer(0)


def call_rotate(shape: Shape, num_tokens: int) -> None:
    heads = empty(num_tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    positions, norm = empty(num_tokens, dtype=torch.int32), empty(shape.head_dim)
    cosine, sine = empty(2, 8192, shape.head_dim // 2, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.int8, INT4):
        for norms in ((None, None), (norm, norm)):
            layer = cache_layer(shape.kv_heads, shape.head_dim, dtype)
            rotate_and_write(heads, positions, cosine, sine, layer, positions, shape.kv_heads, *norms, 1e-6)


HEAD_DIMS = {"64": (64,), "128": (80, 128), "256": (256,)}


def call_attention(operation: str, arch: str, shape: Shape, num_tokens: int) -> None:
    """The heads that an entry such as "paged_attention.decode.128.kv8" serves, padded ones among them."""
    _, name, block, *bits = operation.split(".")
    if bits == ["kv8"]:
        # Where fp8 is missing, int8 is refused no more than elsewhere.
        dtypes = [torch.int8, INT4] if arch == "sm_80" else [torch.int8, INT4, torch.float8_e4m3fn]
    else:
        dtypes = [torch.float32 if name == "float32" else torch.bfloat16]
    integers = empty(64, dtype=torch.int32)
    work = WorkList(empty(64, 5, dtype=torch.int32), integers[:1])
    scratch = make_scratch(64, shape.kv_heads, int(block), torch.device("meta"))
    plan = TritonPlan(integers, integers, integers, empty(64, 512, dtype=torch.int32), None, None, scratch)
    plan = dataclasses.replace(plan, **{"prefill" if name == "prefill" else "decode": work})
    for dtype in dtypes:
        # Below 16 only tests go; with float32 and in four bits they need not be fast.
        has_small = block == "64" and name != "float32" and dtype != INT4
        for head_dim in (*HEAD_DIMS[block], *([8] if has_small else [])):
            queries = empty(
                num_tokens,
                shape.heads,
                head_dim,
                dtype=torch.float32 if name == "float32" else torch.bfloat16,
            )
            layer = cache_layer(shape.kv_heads, head_dim, dtype)
            arguments = (queries, layer, plan, 0.1, shape.sliding_window)
            paged_attention(*arguments, soft_cap=0.0, batch_invariant=name == "batch_invariant")
            if dtype == dtypes[0] and head_dim == int(block):
                paged_attention(*arguments, soft_cap=30.0, batch_invariant=name == "batch_invariant")


OPERATIONS: dict[str, Operation] = {
    "activation": call_activation,
    "block_matmul": call_blocks,
    "codebook_matmul": call_codebook,
    "embedding": call_embedding,
    "group_sums": call_group_sums,
    "int4_matmul.large": call_int4,
    "int4_matmul.segments": call_int4,
    "int8_matmul": call_int8,
    "int8_matmul_grouped": call_int8,
    "int8_matmul_two_terms": call_int8,
    "rotate_and_write": call_rotate,
    "sample_adjust": call_adjust,
    "sample_draw": call_draw,
    "sample_maxima": call_draw,
    "sparse24_int4_matmul.large": call_sparse24,
    "sparse24_int4_matmul.segments": call_sparse24,
    "sparse24_int8_matmul": call_sparse24,
    "weight_only_matmul": call_weight_only,
    "weight_only_matmul.float": call_weight_only,
}
"""By the tiles' names: calls an operation's public functions on meta tensors, for a model and a number of tokens."""

UNTILED: dict[str, Operation] = {"norm": call_norm, "quantize": call_quantize}
"""Likewise, where the tile follows from the shape and is no data."""


def num_tokens(arch: str, operation: str, index: int) -> int:
    """The most tokens that a tile serves, or one more than the others do."""
    table = tiles(TARGETS[arch], operation)
    if table[index].max_tokens is not None:
        return table[index].max_tokens
    return 1 + max((tile.max_tokens or 0 for tile in table[:index]), default=0)


def record_operation(arch: str, operation: str, shape: Shape) -> list[PortableLaunch]:
    """What an operation launches for numbers of tokens that take each of its tiles."""
    with recording(TARGETS[arch]) as launches:
        if operation in UNTILED:
            UNTILED[operation](shape, 1)
        elif operation.startswith("paged_attention."):
            call_attention(operation, arch, shape, 64)
        else:
            for index in range(len(tiles(TARGETS[arch], operation))):
                OPERATIONS[operation](shape, num_tokens(arch, operation, index))
    return [PortableLaunch.of(one) for one in launches]


def compile_and_check(portable: PortableLaunch, arch: str) -> tuple[float, list[str]]:
    """(seconds, problems)"""
    start = time.perf_counter()
    try:
        found = problems(compile_launch(portable.restore(), arch))
        if "soft_cap" in dict(portable.launch.arguments):
            # No model that is supported has one: it is no main path, and may spill a word or two.
            found = [problem for problem in found if not problem.startswith("spills")]
    except Exception as error:  # Triton's errors share no base
        found = [f"{type(error).__name__}: {error}"]
    return time.perf_counter() - start, [f"{portable.launch}: {problem}" for problem in found]


def uses(one: Launch, tile: Tile) -> bool:
    # The number of programs is no part of a kernel.
    sizes = {name: size for name, size in tile.sizes.items() if name != "PROGRAMS"}
    return sizes.items() <= dict(one.constants).items() and (one.num_warps, one.num_stages) == (
        tile.num_warps,
        tile.num_stages,
    )


def matrix() -> list[Any]:
    return [
        pytest.param(
            arch,
            operation,
            shape,
            id=f"{arch}-{operation}-{shape.name}",
        )
        for arch in TARGETS
        for operation in [*json.loads((TILES_DIRECTORY / f"{arch}.json").read_text()), *UNTILED]
        for shape in (SHAPES if arch == "sm_90" else [LLAMA])
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "operation", "shape"), matrix())
def test_every_tile_compiles(compiler: Executor, arch: str, operation: str, shape: Shape) -> None:
    launches = compiler.submit(record_operation, arch, operation, shape).result()
    if operation not in UNTILED:
        for tile in tiles(TARGETS[arch], operation):
            assert any(uses(one.launch, tile) for one in launches), f"no launch uses {tile}"
    check_all(compiler, launches, arch)


def check_all(compiler: Executor, launches: list[PortableLaunch], arch: str) -> None:
    results = list(compiler.map(compile_and_check, launches, repeat(arch)))
    print(f"{len(launches)} kernels in {sum(seconds for seconds, _ in results):.1f} s of one process")
    assert not [problem for _, found in results for problem in found]


ENGINES: list[dict[str, Any]] = [
    {"quant": "int8"},
    {"quant": "int4:g128"},
    {"quant": "none"},
    {"quant": "none", "deterministic": True},
    {"quant": "int8", "kv_cache_dtype": "int8"},
    {"quant": "int4", "deterministic": True, "kv_cache_dtype": "int8"},
    {"quant": "int8", "kv_cache_dtype": "int4"},
    {"quant": "nf4"},
    {"quant": "codebook4"},
    {"quant": "sparse24:int8"},
    {"quant": "sparse24:int4"},
    {"quant": "int4:rotated"},
]
"""Options of the engines whose launches are compiled; `make test` takes the first two."""


def record_engine(arch: str, model: str, options: dict[str, Any]) -> list[PortableLaunch]:
    return [PortableLaunch.of(one) for one in record_launches(EngineConfig(model=model, **options), arch)]


@pytest.mark.parametrize(
    ("arch", "engines"),
    [pytest.param(arch, ENGINES[:2], id=f"{arch}-sample") for arch in SAMPLE]
    + [pytest.param(arch, ENGINES, id=arch, marks=pytest.mark.slow) for arch in TARGETS],
)
def test_what_an_engine_launches_compiles(
    compiler: Executor, tmp_path: Path, arch: str, engines: list[dict[str, Any]]
) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": LLAMA.vocab,
        "hidden_size": LLAMA.hidden,
        "intermediate_size": LLAMA.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": LLAMA.heads,
        "num_key_value_heads": LLAMA.kv_heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    recorded = compiler.map(record_engine, repeat(arch), repeat(str(tmp_path)), engines)
    check_all(compiler, sorted({one for launches in recorded for one in launches}, key=str), arch)
