"""Every instruction set and any number of threads give the same bits: operations and models, in a process each."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.config import EngineConfig
from engine.executor.runner import ModelRunner
from engine.kernels import cpu, rotary, sample
from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.attention.in_c import CpuPlan, cpu_attention, group_segments
from engine.kernels.attention.kv_layer import CACHE_TYPES, KVCache
from engine.kernels.matmul.cpu_grouped import GROUP_SIZES, CpuGroupedMatmul
from engine.kernels.matmul.cpu_int8 import CpuFloatMatmul, CpuInt8Matmul, codebook_grid
from engine.kernels.matmul.cpu_sharded import ShardedInt8Matmul, block_maxima, quantize_part
from engine.kernels.matmul.grouped_weight import GroupedWeight, GroupNumbers
from engine.kernels.nibbles import pack_nibbles
from engine.kernels.norm import rms_norm
from engine.kernels.operands import Int8Format, SparseInt8Activations, SparseInt8Format
from engine.kernels.quantize import quantize_sparse
from engine.kernels.sample import DrawParameters
from engine.loading.dummy import DummyCheckpoint
from engine.quant.block_weight import BLOCK_TYPES
from engine.quant.cpu_formats import CPU_ACTIVATIONS
from engine.quant.sparse24 import Sparse24Int4, Sparse24Int8
from tests.helpers.block_weights import grouped, random_block_weight
from tests.helpers.paged import make_sequences, run_chunks
from tests.helpers.tables import TABLES, bound_table, takes

PLAIN = cpu.Level(("-march=x86-64",), frozenset())
"""Takes the place of "portable", which means this very processor: the C that other architectures run."""

CHUNKS = [[100, 1, 1], [37, 20, 1], [16, 16, 1], [1, 1, 5], [3]]

MODELS = [
    ("smollm2", "int8", "auto"),
    ("gemma3", "int4", "int8"),
    ("smollm2", "none", "fp8_e4m3"),
    ("smollm2", "int8", "int4"),
    ("smollm2", "sparse24:int4", "auto"),
    ("gemma3", "int4:rotated", "auto"),
]
"""Checkpoint, quantization, type of the cache."""

ROTATED = SparseInt8Format(CPU_ACTIVATIONS.spread, is_rotated=True)

Digests = dict[str, str]


def digest(*tensors: torch.Tensor) -> str:
    """Of the tensors' bytes; NaNs, whose bits are free, all alike."""
    result = hashlib.blake2b(digest_size=8)
    for x in tensors:
        if x.dtype == torch.float32:
            x = torch.where(x.isnan(), torch.nan, x)
        result.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def odd_tokens(num_tokens: int, size: int) -> torch.Tensor:
    """Random tokens, and some that are not."""
    x = torch.randn(num_tokens, size) * 3
    x[0], x[1], x[2, 0], x[3, -1] = 0.0, 0.7, 1e6, torch.nan
    x[4] *= 1e-30
    x[5, ::7] *= 50
    return x


def codes_of(x: object) -> torch.Tensor:
    """What is defined of codes: high terms beyond a token's last are not."""
    assert isinstance(x, SparseInt8Activations)
    quads = x.quads.clone()
    for token, size in enumerate(x.tokens[:, 3].tolist()):
        quads[token, size:] = 0
    tokens = x.tokens.clone()
    tokens[tokens[:, 0].clone().view(torch.float32).isnan(), 0] = 0
    return torch.cat((x.low.int(), tokens, quads.flatten(1)), dim=1)


def operations() -> Digests:
    """Every operation on a few shapes."""
    torch.manual_seed(0)
    digests: Digests = {}
    for rows, columns in [(17, 33), (70, 100), (129, 576)]:
        x, bias = odd_tokens(200, columns), torch.randn(rows)
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        weights: list[tuple[Any, torch.Tensor]] = [
            (torch.randint(-128, 128, (rows, columns), dtype=torch.int8), torch.rand(rows)),
            codebook_grid(pack_nibbles(codes), torch.randn(rows, 16), None),
            codebook_grid(pack_nibbles(codes), torch.randn(1, 16), torch.randn(rows, -(-columns // 64))),
        ]
        products: list[Any] = [
            *(CpuInt8Matmul(*weight, bias, CPU_ACTIVATIONS) for weight in weights),
            CpuInt8Matmul(*weights[0], None, SparseInt8Format(0.0)),
            CpuFloatMatmul(torch.randn(rows, columns), bias),
        ]
        width = columns // 4 * 4
        for scheme in (Sparse24Int8(), Sparse24Int4(32), Sparse24Int4(128)):
            tensors = scheme.random(rows, width, torch.device("cpu"))
            product = scheme.bind(tensors, bias)
            parts = [product(x[:size, :width].contiguous()) for size in (1, 2, 3, 4, 5, 16, 200)]
            digests[f"product {scheme.name} {rows} {columns}"] = digest(*parts)
        for group_size in GROUP_SIZES:
            scale = torch.rand(rows, -(-columns // group_size)).half()
            products += [
                CpuGroupedMatmul(grouped(weights[0][0], scale, group_size), None, bias, format)
                for format in (CPU_ACTIVATIONS, SparseInt8Format(0.0), Int8Format(1, group_size))
            ]
            nibbles = GroupedWeight(
                codes=pack_nibbles(codes),
                in_features=columns + columns % 2,
                group_size=group_size,
                scale=GroupNumbers(scale),
                minimum=GroupNumbers(torch.randn(scale.shape).half()),
                bits=4,
            )
            products.append(CpuGroupedMatmul(nibbles, None, bias, CPU_ACTIVATIONS))
        without_scale = grouped(weights[0][0], None, 32)
        products.append(CpuGroupedMatmul(without_scale, weights[0][1], bias, Int8Format(1, 32)))
        for name in BLOCK_TYPES:
            # Nibbles come in pairs.
            width = columns + columns % 2
            weight = random_block_weight(name, rows, width).grouped
            for format in (CPU_ACTIVATIONS, SparseInt8Format(0.0)):
                product = CpuGroupedMatmul(weight, None, bias, format)
                parts = [product(F.pad(x[:size], (0, width - columns))) for size in (1, 4, 5, 16, 35, 200)]
                digests[f"product {name} {format} {rows} {columns}"] = digest(*parts)
        for kind, product in enumerate(products):
            parts = [product(x[:size]) for size in (1, 4, 5, 16, 35, 200)]
            digests[f"product {kind} {rows} {columns}"] = digest(*parts)
        digests[f"sums {rows} {columns}"] = shared_sums(weights[0][0], odd_tokens(200, columns))
    for size in (24, 33, 100, 224, 576):
        x, weight, gates = odd_tokens(20, size), torch.randn(size), odd_tokens(20, 2 * size)
        formats = (None, CPU_ACTIVATIONS, ROTATED)
        for format in formats[1:]:
            digests[f"quantize {format} {size}"] = digest(codes_of(quantize_sparse(x, format)))
        normed = [rms_norm(x.clone(), weight, 1e-5, format, x * 2) for format in formats]
        gated = [apply(gates, format) for apply in (silu_mul, gelu_mul) for format in formats]
        for name, results in (("norm", normed), ("gated", gated)):
            parts = [y if isinstance(y, torch.Tensor) else codes_of(y) for y in results]
            digests[f"{name} {size}"] = digest(*parts)
        ids = torch.tensor([5, 0, 39], dtype=torch.int32)
        for scheme in TABLES:
            if takes(scheme, size):
                matmul, _ = bound_table(scheme, 40, size)
                digests[f"rows {scheme.name} {size}"] = digest(matmul.rows(ids, torch.float32, 7.7))
    for vocab_size in (77, 5_003):
        digests[f"sample {vocab_size}"] = drawn(vocab_size)
    for dtype in CACHE_TYPES:
        for head_dim, window in ((24, None), (80, 100), (128, 300)):
            digests[f"attention {dtype} {head_dim}"] = attention(dtype, head_dim, window)
    return digests


def drawn(vocab_size: int) -> str:
    """Draws with all kinds of filters, and log-probabilities."""
    filters = [(k, p, m) for k in (0, 9, 400) for p in (1.0, 0.9, 0.9999) for m in (0.0, 0.02)] * 4
    count = len(filters)
    logits = torch.randn(count, vocab_size) * torch.linspace(0.1, 5, count)[:, None]
    columns = [torch.tensor(column) for column in zip(*filters, strict=True)]
    keys, temperature = torch.arange(2 * count, dtype=torch.int32).view(2, -1), torch.linspace(0, 2, count)
    how = DrawParameters(keys[0], keys[1], temperature, columns[0].int(), columns[1], columns[2])
    tokens = sample.draw_tokens(logits, how, filters=True)
    found = sample.logprobs_of(logits, tokens, [20] * count)
    return digest(tokens, found.chosen, found.ranks, found.top_ids, found.top_values)


def shared_sums(weight: torch.Tensor, x: torch.Tensor) -> str:
    """Of whole blocks of 32 input features, as one of three ranks would have them if the others had the same."""
    columns = x.shape[1] // 32 * 32
    x, results = x[:, :columns].contiguous(), []
    product = ShardedInt8Matmul(
        weight[:, :columns], torch.ones(len(weight)), None, slice(0, len(weight)), 1, 2
    )
    for size in (1, 4, 5, 16, 35, 200):
        maxima = block_maxima(x[:size])
        codes = quantize_part(x[:size], maxima.repeat(1, 3), CPU_ACTIVATIONS)
        sums = product.sums(codes)
        results += [maxima, codes_of(codes), sums, product.finish(sums, codes)]
    return digest(*results)


def attention(dtype: torch.dtype, head_dim: int, window: int | None) -> str:
    """Rotates, writes and attends to 340 tokens, as chunks and as decodes."""
    length = 340
    angles = torch.rand(length, head_dim // 2)
    heads, words = torch.randn(length, 6 + 2 + 2, head_dim) * 2, torch.arange(length, dtype=torch.int32)
    num_blocks = -(-length // 16)
    layer = KVCache.allocate(1, num_blocks, 16, 2, head_dim, dtype, torch.device("cpu")).layer(0)
    layer.data.zero_()
    weight = torch.randn(head_dim)
    queries = rotary.rotate_and_write(
        heads, words, angles.cos(), angles.sin(), layer, words, 2, weight, weight, 1e-6
    )
    starts = torch.tensor([0, 250, 251, 261, 339], dtype=torch.int32)
    plan = CpuPlan.make(
        num_sequences=torch.tensor([5]),
        query_starts=torch.tensor([*starts.tolist(), length], dtype=torch.int32),
        starts=starts,
        table_rows=torch.zeros(5, dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        partial_starts=torch.arange(0, 10, 2, dtype=torch.int32),
        max_segments=10,
        num_heads=6,
        head_dim=head_dim,
    )
    group_segments(plan, layer.block_size)
    output = cpu_attention(queries, layer, plan, head_dim**-0.5, window)
    return digest(layer.data.view(torch.uint8), output)


def models(directory: Path, num_threads: int) -> Digests:
    """The logits of random models."""
    digests: Digests = {}
    for name, quant, cache in MODELS:
        torch.manual_seed(0)
        config = EngineConfig.from_options(
            model=str(directory / name), quant=quant, kv_cache_dtype=cache, num_threads=num_threads,
            device="cpu", load_format="dummy", kv_cache_memory="4MiB",
        )  # fmt: skip
        runner = ModelRunner(config, DummyCheckpoint(directory / name))  # type: ignore[arg-type]
        logits = run_chunks(runner, make_sequences(runner.model_config.vocab_size, CHUNKS), CHUNKS)
        rows = [row for by_position in logits for row in by_position.values()]
        assert all(row.isfinite().all() for row in rows)
        digests[f"{name} {quant} {cache}"] = digest(*rows)
    return digests


def all_digests(level: str, directory: Path) -> list[Digests]:
    """On one, two and three threads."""
    if platform.machine() == "x86_64":
        cpu.LEVELS["portable"] = PLAIN
    loaded = cpu.library()
    assert loaded is not None
    assert loaded.level == level
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append({**operations(), **models(directory, num_threads)})
    return results


def test_all_levels_and_numbers_of_threads_agree(tmp_path: Path) -> None:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")
    levels = [name for name, level in cpu.LEVELS.items() if level.needs <= cpu.processor_flags()]
    assert len(levels) >= (2 if platform.machine() == "x86_64" else 1)
    from tests.helpers.tiny import TINY_CONFIGS  # slow to import, and the processes below need none of it

    for name in {name for name, _, _ in MODELS}:
        TINY_CONFIGS[name].save_pretrained(tmp_path / name)
    root = str(Path(__file__).parents[2])
    processes = {
        level: subprocess.Popen(
            [sys.executable, __file__, level, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": root, cpu.VARIABLE: level},
            stdout=subprocess.PIPE,
            text=True,
        )
        for level in levels
    }
    results = {level: process.communicate()[0] for level, process in processes.items()}
    assert {level: process.returncode for level, process in processes.items()} == dict.fromkeys(levels, 0)
    digests = {(level, i): d for level in levels for i, d in enumerate(json.loads(results[level]), 1)}
    expected = digests[levels[0], 1]
    differing = {
        key: [name for name in expected if found[name] != expected[name]]
        for key, found in digests.items()
        if found != expected
    }
    assert not differing


if __name__ == "__main__":
    print(json.dumps(all_digests(sys.argv[1], Path(sys.argv[2]))))
