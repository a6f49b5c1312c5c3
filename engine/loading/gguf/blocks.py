"""The blocks of GGUF's quantized types, taken apart: bytes of a matrix become the parts of a `BlockWeight`.

Layouts: ggml-common.h of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType

from engine.kernels import cpu
from engine.kernels.blocks import Layout, take_codes
from engine.quant.block_weight import BLOCK_TYPES, BlockWeight, Parts
from engine.quant.weight import GridWeight, Weight

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_BLOCK = 32

_LOW_OF_FIRST, _LOW_OF_SECOND = np.uint64(0x000F000F000F000F), np.uint64(0x00F000F000F000F0)
"""The low half of the first of two bytes; that of the second, once it is shifted beside it."""
_SIZES = 0x77
"""Two codes of E2M1 in a byte, without their signs."""

_CHUNK = 2**19
"""Bytes that are taken apart at a time, so that what lies between stays in a processor's cache."""


def _halves(data: Bytes) -> torch.Tensor:
    """[N, blocks, 2] bytes → [N, blocks] fp16, never a view of the file."""
    return torch.from_numpy(np.array(data.view(np.float16)[..., 0]))


def _take(data: Bytes, start: int, layout: Layout, otherwise: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The codes of blocks in C, or otherwise."""
    return otherwise() if cpu.library() is None else take_codes(data, start, layout)


def _codes(codes: Bytes) -> torch.Tensor:
    """[N, blocks, …] → [N, K] uint8."""
    return torch.from_numpy(np.ascontiguousarray(codes).reshape(codes.shape[0], -1))


def _nibbles(packed: Bytes) -> Bytes:
    """[N, blocks, bytes] → [N, blocks, 2, bytes] of 0..15: the low halves, which come first, and the high ones."""
    return np.stack((packed & 15, packed >> 4), axis=2)


def _paired(packed: Bytes) -> torch.Tensor:
    """[N, blocks, n bytes] → [N, blocks * n] uint8: neighbours in a byte, the first in its low half.

    In the file a block's low halves come first, and then the high ones. Words of eight bytes are taken apart at once.
    """
    shape = packed.shape
    words = np.ascontiguousarray(packed).view(np.uint64)
    low = words & _LOW_OF_FIRST | words >> np.uint64(4) & _LOW_OF_SECOND
    high = words >> np.uint64(4) & _LOW_OF_FIRST | words >> np.uint64(8) & _LOW_OF_SECOND
    pairs = np.empty((*shape[:2], 2, shape[2] // 2), np.uint8)
    # The low byte of two has both codes.
    pairs[:, :, 0] = low.view(np.uint8)[..., ::2]
    pairs[:, :, 1] = high.view(np.uint8)[..., ::2]
    return torch.from_numpy(pairs.reshape(shape[0], -1))


def _fifth_bits(packed: Bytes) -> Bytes:
    """[N, blocks, 4] → [N, blocks, 2, 16] of 0 or 16."""
    bits = np.unpackbits(np.ascontiguousarray(packed), axis=-1, bitorder="little")
    return np.left_shift(bits, 4, dtype=np.uint8).reshape(*packed.shape[:2], 2, _BLOCK // 2)


def _weight(kind: str, codes: torch.Tensor, **numbers: torch.Tensor) -> BlockWeight:
    """With the codes as `BlockType` stores them, [N, K / codes in a byte]."""
    return BlockWeight(kind, {"codes": codes, **numbers}, codes.shape[1] * (8 // BLOCK_TYPES[kind].bits))


def _chunks(packed: Bytes) -> Bytes:
    """[N, blocks, 128] → [N, blocks, 4, 2, 32] of 0..15: 32 bytes hold 64 elements, the first 32 in low halves."""
    chunks = packed.reshape(*packed.shape[:2], 4, 32)
    return np.stack((chunks & 15, chunks >> 4), axis=3)


def _q4_0(data: Bytes) -> BlockWeight:
    """fp16 scale, 16 bytes: w = scale * (code - 8)."""
    codes = _take(data, 2, "pairs of 16", lambda: _paired(data[..., 2:]))
    return _weight("q4_0", codes, scale=_halves(data[..., :2]))


def _q4_1(data: Bytes) -> BlockWeight:
    """fp16 scale, fp16 minimum, 16 bytes: w = scale * code + minimum."""
    numbers = {"scale": _halves(data[..., :2]), "minimum": _halves(data[..., 2:4])}
    codes = _take(data, 4, "pairs of 16", lambda: _paired(data[..., 4:]))
    return _weight("q4_1", codes, **numbers)


def _q5_0(data: Bytes) -> BlockWeight:
    """fp16 scale, 32 fifth bits, 16 bytes: w = scale * (code - 16)."""
    codes = _take(data, 2, "fives", lambda: _codes(_nibbles(data[..., 6:]) | _fifth_bits(data[..., 2:6])))
    return _weight("q5_0", codes, scale=_halves(data[..., :2]))


def _q5_1(data: Bytes) -> BlockWeight:
    """fp16 scale, fp16 minimum, 32 fifth bits, 16 bytes: w = scale * code + minimum."""
    codes = _take(data, 4, "fives", lambda: _codes(_nibbles(data[..., 8:]) | _fifth_bits(data[..., 4:8])))
    numbers = {"scale": _halves(data[..., :2]), "minimum": _halves(data[..., 2:4])}
    return _weight("q5_1", codes, **numbers)


def _q8_0(data: Bytes) -> GridWeight:
    """fp16 scale, 32 signed bytes."""
    codes = _take(data, 2, "bytes", lambda: _codes(data[..., 2:])).view(torch.int8)
    return GridWeight(codes, _halves(data[..., :2]), None, _BLOCK)


def _k_numbers(data: Bytes) -> dict[str, torch.Tensor]:
    """Scales and minimums of a k-quant's blocks: fp16 d and dmin, then eight pairs of six bits in 12 bytes.

    The first four pairs are the low six bits of bytes 0 … 3 and 4 … 7; of the others, low halves of bytes 8 … 11 and
    high ones have four bits, and the bits that the first twelve left over two more.
    """
    low, high, both = data[..., 4:8], data[..., 8:12], data[..., 12:16]
    scales = np.concatenate((low & 63, (both & 15) | (low >> 6) << 4), axis=2)
    minimums = np.concatenate((high & 63, (both >> 4) | (high >> 6) << 4), axis=2)
    return {
        "scale": _halves(data[..., :2]),
        "scale_steps": _codes(scales).view(torch.int8),
        "minimum": -_halves(data[..., 2:4]),
        "minimum_steps": _codes(minimums).view(torch.int8),
    }


def _q4_k(data: Bytes) -> BlockWeight:
    """w = d * scale * code - dmin * minimum."""
    codes = _take(data, 16, "pairs of 32", lambda: _paired(data[..., 16:].reshape(len(data), -1, _BLOCK)))
    return _weight("q4_k", codes, **_k_numbers(data))


def _q5_k(data: Bytes) -> BlockWeight:
    """As Q4_K, with 32 bytes of fifth bits: bit i of a byte belongs to the i-th 32 elements."""
    places = np.arange(8, dtype=np.uint8).reshape(1, 1, 4, 2, 1)
    fifth: Bytes = np.left_shift(data[..., None, None, 16:48] >> places & 1, 4, dtype=np.uint8)
    return _weight("q5_k", _codes(_chunks(data[..., 48:]) | fifth), **_k_numbers(data))


def _q6_k(data: Bytes) -> BlockWeight:
    """Low halves, two high bits, scales of 16 elements, fp16 d: w = d * scale * (code - 32).

    Twice for 128 elements: 64 bytes hold the low halves of two times 32 elements, then, in their high bits, of two
    more; 32 bytes hold two bits of each of the four.
    """

    def in_numpy() -> torch.Tensor:
        shape = data.shape[:2]
        low = data[..., :128].reshape(*shape, 2, 1, 2, 32)
        high = data[..., 128:192].reshape(*shape, 2, 1, 1, 32)
        nibbles = np.concatenate((low & 15, low >> 4), axis=3)
        places = (2 * np.arange(4, dtype=np.uint8)).reshape(1, 1, 1, 2, 2, 1)
        return _codes(nibbles | (high >> places & 3) << 4)

    return _weight(
        "q6_k",
        _take(data, 0, "sixes", in_numpy),
        scale=_halves(data[..., 208:]),
        scale_steps=_codes(data[..., 192:208]).view(torch.int8),
    )


def _iq4_nl(data: Bytes) -> BlockWeight:
    """As Q4_0, but a code says which of sixteen values."""
    codes = _take(data, 2, "pairs of 16", lambda: _paired(data[..., 2:]))
    return _weight("iq4_nl", codes, scale=_halves(data[..., :2]))


def _iq4_xs(data: Bytes) -> BlockWeight:
    """fp16 d, the two high bits of eight scales, their four low ones, 128 bytes as eight blocks of IQ4_NL's.

    w = d * (scale - 32) * value.
    """
    shape = data.shape[:2]
    high = np.array(data[..., 2:4], order="C").view(np.uint16) >> (2 * np.arange(8, dtype=np.uint16)) & 3
    low = np.stack((data[..., 4:8] & 15, data[..., 4:8] >> 4), axis=3).reshape(*shape, 8)
    steps = (low | high.astype(np.uint8) << 4).astype(np.int8) - 32
    return _weight(
        "iq4_xs",
        _take(data, 8, "pairs of 16", lambda: _paired(data[..., 8:].reshape(shape[0], -1, 16))),
        scale=_halves(data[..., :2]),
        scale_steps=torch.from_numpy(steps.reshape(shape[0], -1)),
    )


def _mxfp4(data: Bytes) -> BlockWeight:
    """An exponent, 16 bytes of E2M1 codes: w = 2^(exponent - 128) * twice the value.

    A block of zeros has the exponent 0, and here the scale zero.
    """
    return _weight("mxfp4", _paired(data[..., 1:]), scale=_mxfp4_scales(data).half())


def _wide_mxfp4(data: Bytes) -> GridWeight:
    """The same with the scales as floats."""
    values = _mxfp4(data).grouped.integers().to(torch.int8)
    return GridWeight(values, _mxfp4_scales(data), None, _BLOCK)


def _mxfp4_scales(data: Bytes) -> torch.Tensor:
    is_zero = ~(data[..., 1:] & _SIZES).any(axis=2)
    scale = np.exp2(data[..., 0].astype(np.float32) - 128)
    return torch.from_numpy(np.where(is_zero, np.float32(0), scale))


DECODERS: dict[GGMLQuantizationType, Callable[[Bytes], BlockWeight | GridWeight]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.IQ4_NL: _iq4_nl,
    GGMLQuantizationType.IQ4_XS: _iq4_xs,
    GGMLQuantizationType.MXFP4: _mxfp4,
}
"""By type, of a matrix's bytes [N, blocks, bytes of a block]."""

_IN_NUMPY = (GGMLQuantizationType.Q5_K, GGMLQuantizationType.MXFP4)
"""Types whose codes no C takes out."""


def read_blocks(data: Bytes, kind: GGMLQuantizationType) -> Weight:
    """A matrix of one of `DECODERS`, from its bytes [N, blocks, bytes of a block], by torch's number of threads."""
    decode = DECODERS[kind]
    if kind == GGMLQuantizationType.MXFP4 and not _has_half_scales(data):
        decode = _wide_mxfp4
    if cpu.library() is not None and kind not in _IN_NUMPY:
        return decode(data)
    step = max(1, _CHUNK // max(1, data[0].nbytes)) if len(data) else 1
    first = decode(data[:step])
    if len(data) <= step:
        return first
    whole = {name: _empty_rows(part, len(data)) for name, part in _parts(first).items()}

    def read(start: int) -> None:
        # By numpy, since each of torch's operators may use all of its threads.
        for name, part in _parts(decode(data[start : start + step])).items():
            whole[name].numpy()[start : start + step] = part.numpy()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(read, range(0, len(data), step)))
    if isinstance(first, BlockWeight):
        return BlockWeight(first.kind, whole, first.in_features)
    return GridWeight(whole["codes"], whole["scale"], None, _BLOCK)


def _has_half_scales(data: Bytes) -> bool:
    """Whether fp16, which holds 2^-24 to 2^15, holds the scales of all of MXFP4's blocks but those of zeros."""
    exponents = data[..., 0]
    is_outside = (exponents < 128 - 24) | (exponents > 128 + 15)
    return not bool((data[is_outside][:, 1:] & _SIZES).any())


def _parts(weight: BlockWeight | GridWeight) -> Parts:
    return weight.parts if isinstance(weight, BlockWeight) else {"codes": weight.codes, "scale": weight.scale}


def _empty_rows(part: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.empty((rows, *part.shape[1:]), dtype=part.dtype)
