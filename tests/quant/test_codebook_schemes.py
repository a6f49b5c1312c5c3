"""NF4 and Codebook4: what is kept as it is, what is rounded, and products against those of the dequantized weight."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import cpu
from engine.kernels.matmul import codebook as codebook_matmul
from engine.kernels.matmul.cpu_int8 import CpuInt8Matmul, codebook_grid
from engine.kernels.quantize import sparse_reference
from engine.quant.codebook import cluster_rows, nf4_values, round_to_nf4
from engine.quant.codebook4 import Codebook4
from engine.quant.cpu_formats import CPU_ACTIVATIONS
from engine.quant.nf4 import NF4
from engine.quant.scheme import Scheme, Tensors
from engine.quant.weight import CodebookWeight

SCHEMES: list[Scheme] = [NF4(), Codebook4()]
SHAPES = [(48, 64), (17, 50), (5, 7), (200, 576), (8, 1536)]


def book_of(stored: Tensors) -> torch.Tensor:
    return stored.get("codebook", nf4_values()[None])


def dequantize(stored: Tensors, columns: int) -> torch.Tensor:
    """The weight that is stored, [N, K] float64, byte by byte."""
    book, scale = book_of(stored).double(), stored.get("scale")
    rows = []
    for n, row in enumerate(stored["codes"].tolist()):
        codes = [byte >> shift & 15 for byte in row for shift in (0, 4)][:columns]
        values = book[n % len(book)][codes]
        rows.append(values if scale is None else values * scale[n].double().repeat_interleave(64)[:columns])
    return torch.stack(rows)


@pytest.mark.parametrize("columns", [64, 576, 100, 7])
def test_floats_are_rounded(columns: int) -> None:
    weight = torch.randn(20, columns)
    nearest = (weight[:, :, None] - cluster_rows(weight).codebook.double()[:, None, :]).abs().amin(dim=2)
    error = (dequantize(Codebook4().quantize(weight), columns) - weight).abs()
    assert torch.all(error <= nearest + 1e-6 * weight.abs())
    expected = round_to_nf4(weight).dequantize()
    assert torch.allclose(dequantize(NF4().quantize(weight), columns).float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("block_size", [64, 128, 192])
def test_nf4_is_kept(block_size: int) -> None:
    """Codes and scales that rounding would not give: no block has its largest value."""
    codes = torch.randint(3, 12, (10, 384), dtype=torch.uint8)
    table = nf4_values()[None] + 2e-7
    weight = CodebookWeight(codes, table, torch.randn(10, 384 // block_size), block_size)
    stored = NF4().quantize(weight)
    assert stored["scale"].shape == (10, 6)
    # NF4's zero is stored as it is, and the others with a relative error of 2e-7 / 0.08 at most.
    assert torch.allclose(dequantize(stored, 384).float(), weight.dequantize(), rtol=3e-6, atol=1e-6)
    assert torch.equal(stored["codes"] & 15, codes[:, 0::2])


def test_what_is_no_nf4_is_rounded_to_it() -> None:
    codes = torch.randint(0, 16, (6, 128), dtype=torch.uint8)
    scale = torch.rand(6, 2) + 0.5
    others = [
        CodebookWeight(codes, torch.linspace(-1, 1, 16)[None], scale, 64),
        CodebookWeight(codes, nf4_values()[None], scale.repeat_interleave(2, dim=1), 32),
        CodebookWeight(codes, torch.randn(6, 16), None, 128),
    ]
    for weight in others:
        expected = round_to_nf4(weight.dequantize()).dequantize()
        assert torch.allclose(dequantize(NF4().quantize(weight), 128).float(), expected, rtol=1e-6, atol=0)


def test_codebooks_are_kept() -> None:
    """In an order, and with duplicates, that clustering would not give."""
    codes = torch.randint(0, 16, (6, 100), dtype=torch.uint8)
    codebook = torch.randn(6, 16).half()
    codebook[:, 9] = codebook[:, 2]
    stored = Codebook4().quantize(CodebookWeight(codes, codebook, None, 100))
    assert torch.equal(stored["codebook"], codebook)
    assert torch.equal(stored["codes"] >> 4, codes[:, 1::2])


def test_codebooks_that_fp16_does_not_hold_are_fitted_anew() -> None:
    weight = CodebookWeight(torch.randint(0, 16, (6, 100), dtype=torch.uint8), torch.randn(6, 16), None, 100)
    stored = Codebook4().quantize(weight)
    error = (dequantize(stored, 100) - weight.dequantize()).abs()
    assert torch.all(error <= weight.dequantize().abs() * 2**-11)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("num_tokens", [1, 3, 17, 130])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_product_is_close_to_the_float_product(
    scheme: Scheme, num_tokens: int, rows: int, columns: int
) -> None:
    stored = scheme.quantize(torch.randn(rows, columns))
    x, bias = torch.randn(num_tokens, columns), torch.randn(rows)
    weight = dequantize(stored, columns)
    expected = x.double() @ weight.t() + bias
    _, row_scale = codebook_grid(stored["codes"], book_of(stored), stored.get("scale"))
    # Each weight is off by half a step of the row's int8 grid and a little, each activation by half of its.
    error = row_scale * (0.5 + 2 / 256)
    bound = x.double().abs().sum(dim=1, keepdim=True) * error
    step = sparse_reference(x, CPU_ACTIVATIONS)[1].double()
    bound += step / 2 * (weight.abs().sum(dim=1) + columns * error)
    assert torch.all((scheme.bind(stored, bias)(x).double() - expected).abs() <= bound * 1.01 + 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_rows_do_not_depend_on_the_batch(scheme: Scheme) -> None:
    matmul = scheme.bind(scheme.quantize(torch.randn(48, 576)), None)
    x = torch.randn(70, 576)
    together = matmul(x)
    for row in (0, 1, 33, 69):
        assert torch.equal(together[row], matmul(x[row : row + 1])[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_torch_s_operators_give_the_same_bits(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """And hold no more than the codes."""
    stored = scheme.quantize(torch.randn(1100, 100))
    x, bias = torch.randn(9, 100), torch.randn(1100)
    expected = scheme.bind(stored, bias)(x)
    monkeypatch.setattr(cpu, "library", lambda: None)
    matmul = scheme.bind(stored, bias)
    assert torch.equal(matmul(x), expected)
    assert isinstance(matmul, CpuInt8Matmul)
    assert not isinstance(matmul.weight, torch.Tensor)
    assert matmul.weight.nibbles.data_ptr() == stored["codes"].data_ptr()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_random_weights_keep_the_size_of_activations(scheme: Scheme) -> None:
    matmul = scheme.bind(scheme.random(512, 576, torch.device("cpu")), None)
    # 512 * 64 normal numbers deviate by 1 up to a few of their 0.4 %, and codes of a row a little.
    assert float(matmul(torch.randn(64, 576)).std()) == pytest.approx(1.0, abs=0.05)


def test_the_gpu_s_reference_is_the_dequantized_product() -> None:
    x = torch.randn(3, 100)
    for scheme in SCHEMES:
        stored = scheme.quantize(torch.randn(8, 100))
        y = codebook_matmul.reference(x, stored["codes"], book_of(stored), stored.get("scale"))
        # A hundred products and sums of float32.
        assert torch.allclose(y.double(), x.double() @ dequantize(stored, 100).t(), rtol=1e-4, atol=1e-4)


def test_values_and_rows_of_a_codebook_weight() -> None:
    codes = torch.tensor([[0, 1, 2], [15, 0, 1]], dtype=torch.uint8)
    books = torch.arange(32.0).view(2, 16)
    own = CodebookWeight(codes, books.half(), None, 3)
    assert own.dequantize().tolist() == [[0.0, 1.0, 2.0], [31.0, 16.0, 17.0]]
    # Groups of two: the last one has one element.
    shared = CodebookWeight(codes, books[:1], torch.tensor([[1.0, 10.0], [2.0, 20.0]]), 2)
    assert shared.dequantize().tolist() == [[0.0, 1.0, 20.0], [30.0, 0.0, 20.0]]
    for weight in (own, shared):
        assert torch.equal(weight.rows(torch.tensor([1, 0])).dequantize(), weight.dequantize().flip(0))
