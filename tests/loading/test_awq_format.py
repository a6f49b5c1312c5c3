"""AWQ directories, against words written down, packing element by element, and compressed-tensors' converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.quant.weight import GridWeight
from tests.helpers.quantized_directory import (
    MODULE,
    assert_refused,
    expected_weight,
    pack_rows,
    random_codes,
    random_scales,
    read_module,
    to_tensor,
    transpose,
    write_directory,
)

ROWS, COLUMNS = 24, 64

# The column that a word's element holds, from its lowest bits on.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def settings(group_size: int = 16, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
        **changes,
    }


def pack(codes: list[list[int]]) -> torch.Tensor:
    """Rows of codes as words, in the order of AWQ."""
    ordered = [[row[start + column] for start in range(0, len(row), 8) for column in ORDER] for row in codes]
    return to_tensor(pack_rows(ordered, 4))


def store(codes: list[list[int]], zeros: list[list[int]], scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes [N][K], zeros [N][G] and scales [N, G] as AWQ stores them."""
    return {"qweight": pack(transpose(codes)), "qzeros": pack(transpose(zeros)), "scales": scales.t()}


def test_words_written_down(tmp_path: Path) -> None:
    """Two columns of eight rows: the digits of a word, lowest first, are rows 0, 2, 4, 6, 1, 3, 5 and 7."""
    parts = {
        "qweight": to_tensor([[0x75316420], [0xFDB9ECA8]]),
        "qzeros": to_tensor([[0x00008000]]),  # row 6 has the zero 8
        "scales": torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 2.0]]).half(),
    }
    weight = read_module(tmp_path, parts, settings(group_size=-1))
    assert isinstance(weight, GridWeight)
    assert weight.codes.tolist() == [[row, row + 8] for row in range(8)]
    assert weight.group_size == 2
    expected = [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [-1, 3], [14, 30]]
    assert weight.dequantize().tolist() == expected


@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_weights_are_a_grid(tmp_path: Path, group_size: int) -> None:
    size = COLUMNS if group_size == -1 else group_size
    codes, zeros = random_codes(ROWS, COLUMNS, 4, seed=1), random_codes(ROWS, COLUMNS // size, 4, seed=2)
    scales = random_scales(ROWS, COLUMNS // size)
    weight = read_module(tmp_path, store(codes, zeros, scales), settings(group_size))
    assert isinstance(weight, GridWeight)
    assert weight.codes.dtype == torch.uint8
    assert weight.codes.tolist() == codes
    assert torch.equal(weight.scale, scales)
    assert weight.minimum is not None
    assert weight.minimum.dtype == torch.float32
    assert weight.group_size == size
    # Scales of 11 bits times 5: float32 holds every product and sum.
    expected = expected_weight(codes, zeros, scales, lambda k: k // size)
    assert torch.equal(weight.dequantize().double(), expected)


def test_any_words_are_read_as_a_library_reads_them(tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    bounds = (-(1 << 31), (1 << 31) - 1)
    words = torch.randint(*bounds, (COLUMNS, ROWS // 8), dtype=torch.int32)
    zero_words = torch.randint(*bounds, (COLUMNS // 16, ROWS // 8), dtype=torch.int32)
    scales = random_scales(ROWS, COLUMNS // 16).t()
    parts = {"qweight": words, "qzeros": zero_words, "scales": scales}
    weight = read_module(tmp_path, parts, settings())
    assert isinstance(weight, GridWeight)
    unpacked = library.AutoAWQConverter.unpack_awq(words, zero_words, 4)
    codes, zeros = ((x & 15).double() for x in library.AutoAWQConverter.reverse_awq_order(*unpacked, 4))
    expected = (codes - zeros.repeat_interleave(16, dim=0)) * scales.repeat_interleave(16, dim=0)
    assert torch.equal(weight.dequantize().double(), expected.t())


def test_modules_that_are_not_converted(tmp_path: Path) -> None:
    parts = store(random_codes(ROWS, COLUMNS, 4, seed=1), [[8] * 4] * ROWS, random_scales(ROWS, 4))
    head = torch.rand(4, 8).half()
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    checkpoint = write_directory(tmp_path, {**tensors, "lm_head.weight": head}, settings())
    assert checkpoint.names() == {f"{MODULE}.weight", "lm_head.weight"}
    stored = checkpoint.tensor("lm_head.weight")
    assert isinstance(stored, torch.Tensor)
    assert torch.equal(stored, head)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 8}, ["bits", "8"]),
        ({"version": "gemv"}, ["version", "gemv"]),
        ({"version": None, "format": "llm-awq"}, ["format", "llm-awq"]),
        ({"backend": "llm-awq"}, ["backend", "llm-awq"]),
        ({"group_size": None}, ["group_size"]),
    ],
)
def test_unsupported_settings_are_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    tensors = {"model.norm.weight": torch.ones(2)}
    assert_refused(lambda: write_directory(tmp_path, tensors, settings(**changes)), "config.json", *words)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("qweight", None, ["missing"]),
        ("qzeros", None, ["missing"]),
        ("scales", None, ["missing"]),
        ("qweight", lambda tensor: tensor.short(), ["int32", "int16"]),
        ("scales", lambda tensor: tensor.double(), ["float16", "float64"]),
        ("scales", lambda tensor: tensor[1:], [f"[4, {ROWS}]", f"[3, {ROWS}]"]),
        ("qzeros", lambda tensor: tensor.t(), ["[4, 3]", "[3, 4]"]),
    ],
)
def test_damaged_tensors_are_named(tmp_path: Path, part: str, change: Any, words: list[str]) -> None:
    parts = store(random_codes(ROWS, COLUMNS, 4, seed=1), [[8] * 4] * ROWS, random_scales(ROWS, 4))
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    assert_refused(
        lambda: read_module(tmp_path, parts, settings()), f"{MODULE}.{part}", str(tmp_path), *words
    )
