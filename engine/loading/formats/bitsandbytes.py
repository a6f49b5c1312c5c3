"""bitsandbytes: LLM.int8() (https://arxiv.org/abs/2208.07339) and NF4 or FP4 (https://arxiv.org/abs/2305.14314).

Eight bits:  weight [N, K] int8, SCB [N]         w[n, k] = weight[n, k] * SCB[n] / 127
Four bits:   weight [ceil(N K / 2), 1]           two codes a byte, the first one in the high bits
             w[i] = quant_map[code[i]] * absmax[i // blocksize]              i = n * K + k
Nested:      absmax as bytes (double quantization)
             absmax[j] = nested_quant_map[byte[j]] * nested_absmax[j // nested_blocksize] + nested_offset

Four bits stay codes where K is a multiple of the block size; where blocks have parts of two rows, weights are floats.
What are no tensors (shape, block sizes, offset) is JSON in the bytes of a tensor named after the type of codes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch

from engine.kernels.nibbles import unpack_nibbles
from engine.loading.formats.stored import FLOATS, Settings, StoredModule, is_left_out
from engine.quant.weight import CodebookWeight, GridWeight, Weight, to_float
from engine.quant_spec import EMBEDDING, LM_HEAD

_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
_FP4_STATE = "weight.quant_state.bitsandbytes__fp4"
_INT8_PARTS = ("SCB", "weight_format")


@dataclass(frozen=True)
class BitsAndBytes:
    """Modules stored by bitsandbytes; the stored tensors say how.

    Attributes:
        kind: The specification of their scheme, as config.json has it.
        left_out: Names of modules that are not quantized, or parts of them.
    """

    parts: ClassVar[tuple[str, ...]] = (
        *_INT8_PARTS,
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        _NF4_STATE,
        _FP4_STATE,
    )
    unused: ClassVar[tuple[str, ...]] = ()
    has_rows: ClassVar[bool] = False

    kind: str
    left_out: tuple[str, ...]

    def scheme(self, names: tuple[str, ...]) -> str:
        """See `engine.loading.formats.WeightFormat`."""
        is_float = names[0] == EMBEDDING or any(is_left_out(name, self.left_out) for name in names)
        return "none" if is_float else self.kind

    def read(self, module: StoredModule) -> Weight:
        """See `engine.loading.formats.WeightFormat`."""
        if any(module.has(part) for part in _INT8_PARTS):
            return _read_int8(module)
        return _read_four_bits(module)


def open_bitsandbytes(settings: Settings) -> BitsAndBytes:
    """The format as config.json describes it.

    Raises:
        CheckpointError: A setting is not supported.
    """
    kind = "int8"
    if settings.values.get("load_in_4bit"):
        # FP4's values are no scheme's.
        values = settings.choice("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
        kind = "nf4" if values == "nf4" else "none"
    has_list = settings.values.get("llm_int8_skip_modules") is not None
    return BitsAndBytes(kind, settings.strings("llm_int8_skip_modules") if has_list else (LM_HEAD,))


def _read_int8(module: StoredModule) -> GridWeight:
    codes = module.read("weight", (torch.int8,), (None, None))
    row_maximum = module.read("SCB", FLOATS, (codes.shape[0],))
    if module.has("weight_format"):
        layout = module.read("weight_format", (torch.uint8,))
        # The others are orders of old GPU kernels.
        if torch.any(layout != 0):
            raise module.error("weight_format", "0 (rows)", str(layout.tolist()))
    return GridWeight(codes, row_maximum.float()[:, None] / 127, None, codes.shape[1])


@dataclass(frozen=True)
class _State:
    """What the JSON of a module in four bits says; without nesting the last two are None."""

    shape: tuple[int, int]
    block_size: int
    nested_block_size: int | None
    nested_offset: float | None


def _read_four_bits(module: StoredModule) -> Weight:
    state = _read_state(module)
    rows, columns = state.shape
    elements = rows * columns
    packed = module.read("weight").flatten().view(torch.uint8)
    if packed.numel() != (elements + 1) // 2:
        expected = f"{(elements + 1) // 2} bytes for shape {list(state.shape)}"
        raise module.error("weight", expected, f"{packed.numel()} bytes")
    absmax = _read_absmax(module, state, -(-elements // state.block_size))
    values = module.read("weight.quant_map", (torch.float32,), (16,))
    # The first of two codes is in the high bits.
    codes = unpack_nibbles(packed[None] << 4 | packed[None] >> 4)[:, :elements]
    if columns % state.block_size:
        whole = CodebookWeight(codes, values[None], absmax[None], state.block_size)
        return to_float(whole).view(rows, columns)
    return CodebookWeight(codes.view(rows, columns), values[None], absmax.view(rows, -1), state.block_size)


def _read_absmax(module: StoredModule, state: _State, num_blocks: int) -> torch.Tensor:
    """The scale of each block, [num_blocks] float32."""
    absmax = module.read("weight.absmax", (torch.float32, torch.uint8), (num_blocks,))
    if absmax.dtype == torch.float32:
        return absmax
    if state.nested_block_size is None or state.nested_offset is None:
        raise module.error("weight.absmax", "float32, as its state has no nested_blocksize", "uint8")
    values = module.read("weight.nested_quant_map", (torch.float32,), (256,))
    num_scales = -(-num_blocks // state.nested_block_size)
    scale = module.read("weight.nested_absmax", (torch.float32,), (num_scales,))
    scale = scale.repeat_interleave(state.nested_block_size)[:num_blocks]
    return values[absmax.long()] * scale + state.nested_offset


def _read_state(module: StoredModule) -> _State:
    part = _FP4_STATE if module.has(_FP4_STATE) else _NF4_STATE
    data = bytes(module.read(part, (torch.uint8,), (None,)).tolist())
    try:
        state = json.loads(data)
    except ValueError as error:
        raise module.error(part, "JSON", f"{len(data)} bytes of something else") from error
    if not isinstance(state, dict):
        raise module.error(part, "a JSON object", repr(state))
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_positive, shape)):
        raise module.error(part, "a shape of two sizes", repr(shape))
    block_size = state.get("blocksize")
    if not _is_positive(block_size):
        raise module.error(part, "a positive blocksize", repr(block_size))
    nested_block_size, nested_offset = state.get("nested_blocksize"), state.get("nested_offset")
    if nested_block_size is not None and not _is_positive(nested_block_size):
        raise module.error(part, "a positive nested_blocksize", repr(nested_block_size))
    if nested_offset is not None and type(nested_offset) not in (int, float):
        raise module.error(part, "a number as nested_offset", repr(nested_offset))
    return _State((shape[0], shape[1]), block_size, nested_block_size, nested_offset)


def _is_positive(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0
