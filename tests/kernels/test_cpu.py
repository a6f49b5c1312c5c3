"""The C bodies against torch's operators, and life without a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.batch import BatchRow
from engine.kernels import cpu
from engine.kernels.attention import paged_attention, plan_attention, rotate_and_write
from engine.kernels.int8_matmul import MAX_C_TOKENS
from engine.kernels.kv_layer import KVLayer
from engine.kernels.norm import reference, rms_norm
from engine.quant.int8 import Int8

needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="there is no C compiler on this machine")


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)


@pytest.fixture
def fresh_lookup() -> Iterator[None]:
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("num_tokens", [1, 2, 5, MAX_C_TOKENS])
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (17, 33), (3, 2), (960, 576), (8, 1536)])
def test_int8_products_are_equal_to_the_bit(
    num_tokens: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = Int8().quantize(torch.randn(rows, columns, generator=generator))
    x = torch.randn(num_tokens, columns, generator=generator) * 3
    x[0, 0] = 1000.0
    x[-1] = 0.0 if num_tokens > 1 else x[-1]
    in_c = Int8().bind(stored, None)(x)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert torch.equal(Int8().bind(stored, None)(x), in_c)


@needs_compiler
def test_int8_extremes_do_not_saturate() -> None:
    stored = {"weight": torch.full((8, 1536), -127, dtype=torch.int8), "scale": torch.ones(8)}
    x = torch.full((1, 1536), 127.0)
    assert torch.equal(Int8().bind(stored, None)(x), torch.full((1, 8), -127.0 * 127 * 1536))


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 576), (3, 64), (2, 5, 80), (4, 1)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape) * 10, torch.randn(shape[-1])
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_rms_norm_of_split_heads_does_not_depend_on_the_batch() -> None:
    heads, weight = torch.randn(4, 6, 64), torch.randn(64)
    together = rms_norm(heads.split((2, 4), dim=1)[0], weight, 1e-5)
    for token in range(4):
        alone = rms_norm(heads[token : token + 1].split((2, 4), dim=1)[0], weight, 1e-5)
        assert torch.equal(alone[0], together[token])


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    stored = Int8().quantize(torch.randn(8, 64))
    x = torch.randn(2, 64)
    x[1, 7] = value
    y = Int8().bind(stored, None)(x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@needs_compiler
def test_rotary_and_cache_write_equal_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, angles = torch.randn(5, 9 + 3 + 3, 64), torch.rand(5, 1, 32)
    cosine, sine = angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)
    slots = torch.tensor([3, 17, 0, 8, 30])
    caches = torch.zeros(2, 2, 8, 4, 3, 64)
    in_c = rotate_and_write(heads.clone(), cosine, sine, KVLayer(caches[0]), slots, 3)
    monkeypatch.setattr(cpu, "library", lambda: None)
    in_torch = rotate_and_write(heads.clone(), cosine, sine, KVLayer(caches[1]), slots, 3)
    torch.testing.assert_close(in_c, in_torch, rtol=0, atol=1e-6)
    torch.testing.assert_close(caches[0], caches[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_keys", [1, 2, 31, 256, 257, 390])
def test_decode_attention_equals_torchs(num_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = KVLayer(torch.randn(2, 100, 4, 3, 64))
    table = (torch.randperm(99)[: -(-num_keys // 4)] + 1).tolist()
    rows = [BatchRow([0], num_keys - 1, 0, table, None)]
    # Large scores: the softmax has one clear winner and tails that all but vanish.
    queries = torch.randn(1, 9, 64) * 4
    arguments = (rows, layer, None, torch.float32)
    in_c = paged_attention(queries, layer, plan_attention(*arguments), 1.0)
    monkeypatch.setattr(cpu, "library", lambda: None)
    in_torch = paged_attention(queries, layer, plan_attention(*arguments), 1.0)
    torch.testing.assert_close(in_c, in_torch, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_decode_attention_does_not_depend_on_the_batch() -> None:
    layer = KVLayer(torch.randn(2, 200, 4, 3, 64))
    rows = [BatchRow([0], last, 0, torch.randperm(199)[:150].add(1).tolist(), None) for last in (5, 599, 300)]
    queries = torch.randn(3, 9, 64)
    together = paged_attention(queries, layer, plan_attention(rows, layer, None, torch.float32), 0.1)
    for i, row in enumerate(rows):
        alone = paged_attention(
            queries[i : i + 1], layer, plan_attention([row], layer, None, torch.float32), 0.1
        )
        assert torch.equal(alone[0], together[i])


@pytest.mark.usefixtures("without_library")
def test_without_a_library_torchs_operators_serve() -> None:
    x, weight = torch.randn(2, 64), torch.randn(64)
    assert not cpu.serves(x)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5))


@pytest.mark.usefixtures("fresh_lookup")
@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "no C compiler (no-such-compiler)"),
        ("false", "could not build the CPU kernels"),
    ],
)
def test_a_compiler_that_is_missing_or_fails_is_said_and_survived(
    compiler: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level("INFO"):
        assert cpu.library() is None
    assert message in caplog.text
