"""GGUF's block types, against bytes packed here from their published layouts (ggml-common.h, ggml-quants.c).

Each function draws a block's numbers, packs them, and says what every element is worth: in Python's floats, which
hold the products exactly, so that the reader's float32 must be the exact value rounded once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from engine.loading.checkpoint import open_checkpoint
from engine.loading.gguf import blocks
from engine.loading.gguf.blocks import DECODERS, read_blocks
from engine.quant.block_weight import BLOCK_TYPES as NATIVE_TYPES
from engine.quant.block_weight import BlockWeight
from engine.quant.int4 import Int4
from engine.quant.weight import GridWeight, Weight, on_grid, to_float
from tests.helpers.gguf_file import write_gguf

ROWS, BLOCKS = 5, 3

Block = tuple[bytes, list[float]]
"""The bytes of a block, and the values of its elements."""


def half(random: Random) -> float:
    """A number that fp16 holds."""
    return float(np.float16(random.uniform(-2, 2)))


def draw(random: Random, count: int, bits: int) -> list[int]:
    return [random.randrange(1 << bits) for _ in range(count)]


def nibbles(codes: list[int]) -> bytes:
    """The low four bits of 32 codes: the first 16 in the low halves of bytes, the others in the high ones."""
    return bytes(codes[i] & 15 | (codes[i + 16] & 15) << 4 for i in range(16))


def fifth_bits(codes: list[int]) -> int:
    return sum((code >> 4) << place for place, code in enumerate(codes))


def q8_0(random: Random) -> Block:
    scale, codes = half(random), [code - 128 for code in draw(random, 32, 8)]
    return struct.pack("<e32b", scale, *codes), [scale * code for code in codes]


def q4_0(random: Random) -> Block:
    scale, codes = half(random), draw(random, 32, 4)
    return struct.pack("<e16s", scale, nibbles(codes)), [scale * (code - 8) for code in codes]


def q4_1(random: Random) -> Block:
    scale, minimum, codes = half(random), half(random), draw(random, 32, 4)
    data = struct.pack("<ee16s", scale, minimum, nibbles(codes))
    return data, [scale * code + minimum for code in codes]


def q5_0(random: Random) -> Block:
    scale, codes = half(random), draw(random, 32, 5)
    data = struct.pack("<eI16s", scale, fifth_bits(codes), nibbles(codes))
    return data, [scale * (code - 16) for code in codes]


def q5_1(random: Random) -> Block:
    scale, minimum, codes = half(random), half(random), draw(random, 32, 5)
    data = struct.pack("<eeI16s", scale, minimum, fifth_bits(codes), nibbles(codes))
    return data, [scale * code + minimum for code in codes]


IQ4_VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def iq4_nl(random: Random) -> Block:
    scale, codes = half(random), draw(random, 32, 4)
    return struct.pack("<e16s", scale, nibbles(codes)), [scale * IQ4_VALUES[code] for code in codes]


def mxfp4(random: Random) -> Block:
    """E2M1 codes, their highest bit the sign, and an exponent with a bias of 127."""
    exponent, codes = random.randrange(117, 130), draw(random, 32, 4)
    values = [2.0 ** (exponent - 127) * E2M1[code & 7] * (-1 if code & 8 else 1) for code in codes]
    return struct.pack("<B16s", exponent, nibbles(codes)), values


def quarters(codes: list[int]) -> bytes:
    """The low two bits of 256 codes: byte l of a half holds its elements l, l + 32, l + 64 and l + 96."""
    return bytes(
        sum((codes[128 * part + 32 * j + place] & 3) << 2 * j for j in range(4))
        for part in range(2)
        for place in range(32)
    )


def q2_k(random: Random) -> Block:
    """16 elements share a scale and a minimum of four bits each."""
    d, dmin, codes = half(random), half(random), draw(random, 256, 2)
    scales, minimums = draw(random, 16, 4), draw(random, 16, 4)
    pairs = bytes(scale | minimum << 4 for scale, minimum in zip(scales, minimums, strict=True))
    data = struct.pack("<16s64see", pairs, quarters(codes), d, dmin)
    return data, [d * scales[i // 16] * code - dmin * minimums[i // 16] for i, code in enumerate(codes)]


def q3_k(random: Random) -> Block:
    """16 elements share a scale of six bits; a code's third bit lies apart."""
    d, codes, scales = half(random), draw(random, 256, 3), draw(random, 16, 6)
    third_bits = bytes(sum((codes[32 * j + place] >> 2) << j for j in range(8)) for place in range(32))
    low = bytes(scales[i] & 15 | (scales[i + 8] & 15) << 4 for i in range(8))
    high = bytes(sum((scales[i + 4 * j] >> 4) << 2 * j for j in range(4)) for i in range(4))
    data = struct.pack("<32s64s8s4se", third_bits, quarters(codes), low, high, d)
    return data, [d * (scales[i // 16] - 32) * (code - 4) for i, code in enumerate(codes)]


def six_bits(scales: list[int], minimums: list[int]) -> bytes:
    """Eight scales and eight minimums; those of the last four are spread over the others' high bits."""
    return bytes(
        [scales[j] | (scales[j + 4] >> 4) << 6 for j in range(4)]
        + [minimums[j] | (minimums[j + 4] >> 4) << 6 for j in range(4)]
        + [scales[j + 4] & 15 | (minimums[j + 4] & 15) << 4 for j in range(4)]
    )


def pairs_of_32(codes: list[int]) -> bytes:
    """The low four bits of 256 codes: of each 64 the first 32 in the low halves of bytes."""
    return bytes(
        codes[64 * part + place] & 15 | (codes[64 * part + 32 + place] & 15) << 4
        for part in range(4)
        for place in range(32)
    )


def q4_k(random: Random) -> Block:
    """32 elements share a scale and a minimum of six bits each."""
    d, dmin, codes = half(random), half(random), draw(random, 256, 4)
    scales, minimums = draw(random, 8, 6), draw(random, 8, 6)
    data = struct.pack("<ee12s128s", d, dmin, six_bits(scales, minimums), pairs_of_32(codes))
    return data, [d * scales[i // 32] * code - dmin * minimums[i // 32] for i, code in enumerate(codes)]


def q5_k(random: Random) -> Block:
    """As Q4_K; bit j of byte l is the fifth bit of element 32 j + l."""
    d, dmin, codes = half(random), half(random), draw(random, 256, 5)
    scales, minimums = draw(random, 8, 6), draw(random, 8, 6)
    high = bytes(sum((codes[32 * j + place] >> 4) << j for j in range(8)) for place in range(32))
    data = struct.pack("<ee12s32s128s", d, dmin, six_bits(scales, minimums), high, pairs_of_32(codes))
    return data, [d * scales[i // 32] * code - dmin * minimums[i // 32] for i, code in enumerate(codes)]


def q6_k(random: Random) -> Block:
    """16 elements share a signed byte as their scale; a code's high two bits lie apart."""
    d, codes = half(random), draw(random, 256, 6)
    scales = [scale - 128 for scale in draw(random, 16, 8)]
    low, high = bytearray(128), bytearray(64)
    for part in range(2):
        for place in range(32):
            a, b, c, e = (codes[128 * part + 32 * j + place] for j in range(4))
            low[64 * part + place] = a & 15 | (c & 15) << 4
            low[64 * part + 32 + place] = b & 15 | (e & 15) << 4
            high[32 * part + place] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6
    data = struct.pack("<128s64s16be", bytes(low), bytes(high), *scales, d)
    return data, [d * scales[i // 16] * (code - 32) for i, code in enumerate(codes)]


BLOCK_TYPES: dict[Type, Callable[[Random], Block]] = {
    Type.Q8_0: q8_0,
    Type.Q4_0: q4_0,
    Type.Q4_1: q4_1,
    Type.Q5_0: q5_0,
    Type.IQ4_NL: iq4_nl,
    Type.MXFP4: mxfp4,
    Type.Q5_1: q5_1,
    Type.Q2_K: q2_k,
    Type.Q3_K: q3_k,
    Type.Q4_K: q4_k,
    Type.Q5_K: q5_k,
    Type.Q6_K: q6_k,
}


def read(path: Path, rows: list[list[Block]], kind: Type) -> tuple[Weight, torch.Tensor]:
    """What the reader makes of rows of blocks, and what they are worth, [N, K] float64."""
    stored = np.array([list(b"".join(data for data, _ in row)) for row in rows], dtype=np.uint8)
    values = [[value for _, block in row for value in block] for row in rows]
    write_gguf(path, tensors={"blk.3.ffn_down.weight": (stored, kind)})
    weight = open_checkpoint(path).tensor("model.layers.3.mlp.down_proj.weight")
    return weight, torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_a_matrix_is_what_its_rows_are(kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are taken apart at a time, by as many threads as there are."""
    block_bytes = GGML_QUANT_SIZES[kind][1]
    data = np.random.default_rng(kind.value).integers(0, 256, (37, BLOCKS, block_bytes), dtype=np.uint8)
    # Without a bit of the exponent, every fp16 is a number.
    data &= 0xBF
    whole = parts_of(read_blocks(data, kind))
    monkeypatch.setattr(blocks, "_CHUNK", 5 * BLOCKS * block_bytes)
    pieces = parts_of(read_blocks(data, kind))
    assert pieces.keys() == whole.keys()
    for name, part in whole.items():
        assert part.dtype == pieces[name].dtype
        assert torch.equal(pieces[name], part), name


def parts_of(weight: Weight) -> dict[str, torch.Tensor]:
    if isinstance(weight, BlockWeight):
        return weight.parts
    assert isinstance(weight, GridWeight)
    return {"codes": weight.codes, "scale": weight.scale}


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_blocks_of_the_published_layout(tmp_path: Path, kind: Type) -> None:
    random = Random(kind.value)
    rows = [[BLOCK_TYPES[kind](random) for _ in range(BLOCKS)] for _ in range(ROWS)]
    weight, expected = read(tmp_path / "model.gguf", rows, kind)
    assert torch.equal(to_float(weight), expected.float())
    name = kind.name.lower()
    if name in NATIVE_TYPES:
        assert isinstance(weight, BlockWeight)
        assert weight.kind == name
        assert torch.equal(to_float(on_grid(weight)), expected.float())
    assert isinstance(weight, GridWeight) == (kind == Type.Q8_0)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_floats_of_the_published_layout(tmp_path: Path, kind: Type) -> None:
    """BF16 is the upper half of a float32's bytes."""
    values = [[1.0, -2.5, 2.0**-20, 0.0], [-0.0, 3.0, 1.5, -1024.0]]
    size = 4 if kind == Type.F32 else 2
    code = "<e" if kind == Type.F16 else "<f"
    data = [[byte for value in row for byte in struct.pack(code, value)[-size:]] for row in values]
    stored = np.array(data, dtype=np.uint8)
    if kind != Type.BF16:
        stored = stored.view(np.float32 if kind == Type.F32 else np.float16)
    path = write_gguf(tmp_path / "model.gguf", tensors={"output.weight": (stored, kind)})
    weight = open_checkpoint(path).tensor("lm_head.weight")
    assert isinstance(weight, torch.Tensor)
    assert weight.element_size() == size
    assert weight.tolist() == values


@pytest.mark.parametrize("scale", [-2.0, 8192.0, 2.0**-24], ids=["negative", "huge", "subnormal"])
def test_q4_0_is_exact_for_every_scale(tmp_path: Path, scale: float) -> None:
    """Its minimum, -8 scales, may be more than fp16 holds."""
    codes = [*range(16), *range(16)]
    block = struct.pack("<e16s", scale, nibbles(codes)), [scale * (code - 8) for code in codes]
    weight, expected = read(tmp_path / "model.gguf", [[block]], Type.Q4_0)
    assert torch.equal(to_float(weight).double(), expected)


def test_mxfp4_has_blocks_of_zeros(tmp_path: Path) -> None:
    """llama.cpp gives them the exponent 0, whose power of two fp16 does not hold."""
    random = Random(0)
    zeros = struct.pack("<B16s", 0, bytes(16)), [0.0] * 32
    weight, expected = read(tmp_path / "model.gguf", [[mxfp4(random), zeros]], Type.MXFP4)
    assert isinstance(weight, BlockWeight)
    assert torch.equal(to_float(weight), expected.float())


def test_int4_keeps_the_grid_of_q4_0(tmp_path: Path) -> None:
    """Scales of either sign, as Q4_0 files have them; the product is that of the dequantized weight."""
    random = Random(0)
    rows = [[q4_0(random) for _ in range(BLOCKS)] for _ in range(48)]
    weight, expected = read(tmp_path / "model.gguf", rows, Type.Q4_0)
    weight = on_grid(weight)
    assert isinstance(weight, GridWeight)
    assert 0.2 < float((weight.scale < 0).float().mean()) < 0.8
    scheme = Int4(32)
    stored = scheme.quantize(weight)
    kept = (stored["scale"].double(), stored["minimum"].double())
    assert torch.equal(kept[0], weight.scale.double())
    assert torch.equal(kept[1], -8 * weight.scale.double())
    x = torch.randn(3, expected.shape[1])
    exact = x.double() @ expected.t()
    # Weights and activations are int8: steps of 1 / 127 of their rows' largest, less than 1 % as root mean square.
    error = scheme.bind(stored, None)(x).double() - exact
    assert error.norm() < 0.02 * exact.norm()
