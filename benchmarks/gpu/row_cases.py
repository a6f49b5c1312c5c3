"""Timed work on a token at a time, and the sampler, in Llama-3.1-8B's sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from benchmarks.gpu.attention import LLAMA
from benchmarks.gpu.cases import Case, products
from benchmarks.gpu.matmuls import tokens
from benchmarks.gpu.paged import make_layer
from benchmarks.gpu.sampling import draw_parameters
from benchmarks.gpu.timing import Call, num_copies
from engine.kernels.activation import silu_mul
from engine.kernels.embedding import lookup
from engine.kernels.norm import rms_norm
from engine.kernels.operands import Int8Format, SumsFormat
from engine.kernels.quantize import quantize_per_token
from engine.kernels.rotary import rotate_and_write
from engine.kernels.sample import draw_tokens

BF16 = torch.bfloat16
VOCAB_SIZE = 128256


def row_cases(kind: str, counts: Sequence[int], device: torch.device) -> list[Case]:
    """What is computed a token at a time, in Llama-3.1-8B's sizes, beside torch's operators."""
    hidden, inner = 4096, 14336
    cases = []
    for count in counts:
        calls: dict[str, Callable[[], Sequence[Call]]]
        if kind.startswith("rms_norm"):
            format = {"": None, "sums": SumsFormat(), "int8": Int8Format(2)}[kind.partition(" ")[2]]
            size = count * hidden * 4
            copies = num_copies(size, device)
            x = [tokens(count, hidden, BF16, device) for _ in range(min(copies, 400))]
            weight = tokens(1, hidden, BF16, device)[0]
            calls = {
                "ours": products(lambda w, rows, f=format: rms_norm(rows, w, 1e-5, f), [weight] * len(x), x),
                "torch": products(lambda w, rows: F.rms_norm(rows, (hidden,), w, 1e-5), [weight] * len(x), x),
            }
        elif kind.startswith("silu_mul"):
            format = {"": None, "sums": SumsFormat(), "int8": Int8Format(2)}[kind.partition(" ")[2]]
            size = count * inner * 6
            x = [tokens(count, 2 * inner, BF16, device) for _ in range(min(num_copies(size, device), 400))]
            calls = {
                "ours": products(lambda _, rows, f=format: silu_mul(rows, f), [None] * len(x), x),
                "torch": products(lambda _, rows: _torch_silu(rows), [None] * len(x), x),
            }
        elif kind == "quantize":
            size = count * hidden * 4
            x = [tokens(count, hidden, BF16, device) for _ in range(min(num_copies(size, device), 400))]
            calls = {
                "ours": products(lambda _, rows: quantize_per_token(rows, Int8Format(2)), [None] * len(x), x)
            }
        elif kind == "embedding":
            size = count * hidden * 3
            calls = _embedding_calls(count, hidden, device)
        else:
            size, calls = _rotary_calls(count, device)
        cases.append(Case(count, size, 0, calls))
    return cases


def _torch_silu(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


def _embedding_calls(
    count: int, features: int, device: torch.device
) -> dict[str, Callable[[], Sequence[Call]]]:
    codes = torch.randint(-127, 128, (VOCAB_SIZE, features), dtype=torch.int8, device=device)
    scale = torch.rand(VOCAB_SIZE, features // 32, device=device).half()
    ids = [torch.randint(0, VOCAB_SIZE, (count,), device=device, dtype=torch.int32) for _ in range(100)]
    return {"ours": products(lambda _, ids: lookup(ids, codes, scale, 32, BF16), [None] * len(ids), ids)}


def _rotary_calls(count: int, device: torch.device) -> tuple[int, dict[str, Callable[[], Sequence[Call]]]]:
    heads, total = LLAMA, LLAMA.num_heads + 2 * LLAMA.num_kv_heads
    size = 4 * count * total * heads.head_dim
    layer = make_layer(-(-count // 16) + 1, heads, device, is_filled=True)
    x = [
        torch.randn(count, total, heads.head_dim, dtype=BF16, device=device)
        for _ in range(min(num_copies(size, device), 400))
    ]
    positions = torch.arange(count, dtype=torch.int32, device=device)
    slots = positions + 16
    table = torch.rand(8192, heads.head_dim // 2, device=device)

    def call(_: None, rows: torch.Tensor) -> torch.Tensor:
        return rotate_and_write(rows, positions, table, table, layer, slots, heads.num_kv_heads)

    return size, {"ours": products(call, [None] * len(x), x)}


def sample_cases(kind: str, counts: Sequence[int], device: torch.device) -> list[Case]:
    """A draw from logits of Llama 3's vocabulary; beside it the search or the sort that torch has."""
    filters = [(0, 0.9, 0.0)] if kind == "top_p" else [(50, 1.0, 0.0)] if kind == "top_k" else [(0, 1.0, 0.0)]
    cases = []
    for count in counts:
        size = 4 * count * VOCAB_SIZE
        copies = num_copies(size, device)
        logits = [torch.randn(count, VOCAB_SIZE, device=device) * 3 for _ in range(min(copies, 100))]
        how = draw_parameters(count, device, 0.0 if kind == "greedy" else 0.8, filters)
        has_filters = kind in ("top_p", "top_k")
        calls = {
            "ours": products(
                lambda how, x, f=has_filters: draw_tokens(x, how, filters=f), [how] * len(logits), logits
            ),
            "torch": products(
                lambda _, x, f=has_filters: x.sort(dim=1) if f else x.argmax(dim=1),
                [None] * len(logits),
                logits,
            ),
        }
        cases.append(Case(count, size, 0, calls))
    return cases
