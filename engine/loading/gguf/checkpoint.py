"""A GGUF file as a Checkpoint: Hugging Face tensor names, row order and conventions."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize

from engine.errors import CheckpointError
from engine.loading.gguf.config import translate_config, translate_generation_config
from engine.loading.gguf.file import GGUFFile
from engine.loading.slices import check_shape, take_slices
from engine.models.modules import ROLES
from engine.parallel.shards import WHOLE, Slices
from engine.quant.weight import GridWeight, Weight
from engine.quant_spec import EMBEDDING, LM_HEAD, SchemeSpec, parse_scheme_spec

logger = logging.getLogger(__name__)

_BLOCK_SIZE = 32

_FLOAT_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# Read as codes of their grid.
_GRID_TYPES = (
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.MXFP4,
)
# Of these int8 in groups of 32 holds the very numbers: a scale for 32, no minimum, values of eight bits.
_EXACT_TYPES = tuple(kind for kind in _GRID_TYPES if kind != GGMLQuantizationType.Q4_1)
# Read as float32: groups of 16, minimums, or scales that are products of more bits than fp16 holds.
_OTHER_TYPES = (
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
    GGMLQuantizationType.TQ1_0,
    GGMLQuantizationType.TQ2_0,
    GGMLQuantizationType.IQ1_S,
    GGMLQuantizationType.IQ1_M,
    GGMLQuantizationType.IQ2_XXS,
    GGMLQuantizationType.IQ2_XS,
    GGMLQuantizationType.IQ2_S,
    GGMLQuantizationType.IQ3_XXS,
    GGMLQuantizationType.IQ3_S,
    GGMLQuantizationType.IQ4_XS,
)
_RUNS_AS = "int8:g32"

_ROUNDING = (
    "rounding them to eight bits in groups of 32 moves them by 0.5 % (RMS); --quant none makes floats of them"
)

# The sixteen values of IQ4_NL, and twice those of MXFP4's E2M1 (https://arxiv.org/abs/2310.10537), by code.
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_SUPPORTED_TYPES = (*_FLOAT_TYPES, *_GRID_TYPES, *_OTHER_TYPES)

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    **{projection.gguf: projection.name for role in ROLES for projection in role.projections},
}
_GEMMA3_LAYER_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GGUFCheckpoint:
    """The weights and configuration of a GGUF file; see `engine.loading.checkpoint.Checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes_read = path, 0
        self._file = GGUFFile(path)
        self.config: dict[str, Any] = translate_config(self._file)
        self.generation_config: dict[str, Any] = translate_generation_config(self._file)
        self._gguf_names = _hugging_face_names(self._file)
        for gguf_name in self._gguf_names.values():
            _check_type(self._file, self._file.tensors[gguf_name])
        self._file.forget_metadata()

    def names(self) -> set[str]:
        return set(self._gguf_names)

    def other_names(self) -> set[str]:
        return set()

    def auto_schemes(self, modules: Iterable[str]) -> dict[str, SchemeSpec]:
        """What `--quant auto` makes of some modules: eight bits in groups of 32 of what is quantized here, floats of
        the rest. Modules that share a product, of which one is of floats, are floats.
        """
        schemes = {
            module: parse_scheme_spec("none" if self._is_float(module) else _RUNS_AS)
            for module in modules
            if f"{module}.weight" in self._gguf_names
        }
        for layer in range(self.config["num_hidden_layers"]):
            for role in ROLES:
                shared = [module for module in role.modules(f"model.layers.{layer}") if module in schemes]
                if len({schemes[module] for module in shared}) > 1:
                    schemes |= dict.fromkeys(shared, parse_scheme_spec("none"))
        if self.config["tie_word_embeddings"] and EMBEDDING in schemes:
            schemes[LM_HEAD] = schemes[EMBEDDING]
        self._log_rounded()
        if any(words.kind != "none" for words in schemes.values()):
            # A table of eight bits has one form, which the default stands for.
            return {
                name: words for name, words in schemes.items() if name != EMBEDDING or words.kind == "none"
            }
        return {}

    def _is_float(self, module: str) -> bool:
        return self._file.tensors[self._gguf_names[f"{module}.weight"]].tensor_type in _FLOAT_TYPES

    def _log_rounded(self) -> None:
        """Says which types `--quant auto` does not keep to the bit."""
        kinds = Counter(
            tensor.tensor_type.name
            for tensor in self._file.tensors.values()
            if len(tensor.shape) > 1 and tensor.tensor_type not in (*_FLOAT_TYPES, *_EXACT_TYPES)
        )
        if kinds:
            logger.warning(
                "%s: without --quant, matrices of %s run as %s: %s",
                self.path,
                ", ".join(f"{name} ({count})" for name, count in sorted(kinds.items())),
                _RUNS_AS,
                _ROUNDING,
            )

    def tensor(self, name: str, part: Slices = WHOLE, shape: tuple[int, ...] | None = None) -> Weight:
        gguf_name = self._gguf_names.get(name)
        if gguf_name is None:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        tensor = self._file.tensors[gguf_name]
        check_shape(self.path, name, _shape(tensor), shape)
        if self._file.architecture == "llama" and ".attn_q." in gguf_name:
            return self._read_heads(tensor, part, self.config["num_attention_heads"])
        if self._file.architecture == "llama" and ".attn_k." in gguf_name:
            return self._read_heads(tensor, part, self.config["num_key_value_heads"])
        weight = self._read(tensor, part)
        if self._file.architecture == "gemma3" and gguf_name.endswith("norm.weight"):
            # GGUF stores w + 1, the factor that Gemma multiplies by.
            assert isinstance(weight, torch.Tensor)
            return weight - 1
        return weight

    def _read_heads(self, tensor: ReaderTensor, part: Slices, heads: int) -> Weight:
        """A part of a llama-architecture Q or K projection (or its bias), rows in Hugging Face's order.

        GGUF keeps the two rows that rotate together side by side; Hugging Face keeps them half a head apart. So
        whole heads are read.
        """
        num_rows, head_dim = _shape(tensor)[0], self.config["head_dim"]
        if num_rows != heads * head_dim:
            expected = f"{heads * head_dim} rows, {heads} heads of {head_dim}"
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r}: expected {expected}, found {num_rows}"
            )
        rows = part.rows or slice(0, num_rows)
        whole = _widened(rows, head_dim)
        weight = self._read(tensor, Slices(whole, part.columns))
        index = torch.arange(weight.shape[0]).view(-1, head_dim // 2, 2).transpose(1, 2).reshape(-1)
        index = index[rows.start - whole.start : rows.stop - whole.start]
        return weight[index] if isinstance(weight, torch.Tensor) else weight.rows(index)

    def _read(self, tensor: ReaderTensor, part: Slices) -> Weight:
        """A part, rows in the file's order."""
        kind, data = tensor.tensor_type, tensor.data
        if part.rows is not None:
            data = data[part.rows]
        if part.columns is None:
            return self._decode(kind, data)
        block_size = GGML_QUANT_SIZES[kind][0]
        whole = _widened(part.columns, block_size)
        if whole != part.columns and kind in _GRID_TYPES:
            # Says what is cut, or takes a part of a row's only group.
            return take_slices(self._decode(kind, data), Slices(None, part.columns), tensor.name)
        # An array of bytes, or of floats.
        items = data.shape[1] * block_size // _shape(tensor)[1]
        weight = self._decode(
            kind, data[:, whole.start // block_size * items : whole.stop // block_size * items]
        )
        inside = slice(part.columns.start - whole.start, part.columns.stop - whole.start)
        return weight if whole == part.columns else take_slices(weight, Slices(None, inside), tensor.name)

    def _decode(self, kind: GGMLQuantizationType, data: np.ndarray[Any, np.dtype[Any]]) -> Weight:
        self.num_bytes_read += data.nbytes
        return _decode(kind, data)


def _hugging_face_names(file: GGUFFile) -> dict[str, str]:
    """GGUF tensor names by Hugging Face name."""
    layer_names = _GEMMA3_LAYER_NAMES if file.architecture == "gemma3" else _LAYER_NAMES
    names = {}
    for gguf_name in file.tensors:
        if gguf_name == "rope_freqs.weight":  # read by translate_config
            continue
        match = _LAYER_NAME.fullmatch(gguf_name)
        if gguf_name in _GLOBAL_NAMES:
            names[_GLOBAL_NAMES[gguf_name]] = gguf_name
        elif match and match[2] in layer_names:
            names[f"model.layers.{match[1]}.{layer_names[match[2]]}.{match[3]}"] = gguf_name
        else:
            # Leaving a tensor out would change what the model computes without a word.
            raise CheckpointError(
                f"{file.path}: tensor {gguf_name!r} is unknown for architecture {file.architecture!r}"
            )
    return names


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    # GGUF names the size of a row first.
    return tuple(int(size) for size in reversed(tensor.shape))


def _widened(part: slice, step: int) -> slice:
    """A slice, widened to multiples of a step."""
    return slice(part.start // step * step, -(-part.stop // step) * step)


def _check_type(file: GGUFFile, tensor: ReaderTensor) -> None:
    if tensor.tensor_type not in _SUPPORTED_TYPES:
        supported = ", ".join(kind.name for kind in _SUPPORTED_TYPES)
        raise CheckpointError(
            f"{file.path}: tensor {tensor.name!r} has type {tensor.tensor_type.name}; supported are {supported}"
        )


def _decode(kind: GGMLQuantizationType, data: np.ndarray[Any, np.dtype[Any]]) -> Weight:
    """Stored data as float or on its grid, [N, K] or [N], independent of the file's memory map."""
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return torch.from_numpy(np.array(data))
    if kind == GGMLQuantizationType.BF16:
        return torch.from_numpy(np.array(data)).view(torch.bfloat16)
    if data.ndim == 2 and kind in _DECODERS:
        return _DECODERS[kind](data)
    return torch.from_numpy(dequantize(np.ascontiguousarray(data), kind))


def _decode_q4_0(data: np.ndarray[Any, np.dtype[np.uint8]]) -> GridWeight:
    """Blocks of fp16 scale and 16 bytes as in Q4_1: w = scale * (code - 8)."""
    blocks = data.reshape(data.shape[0], -1, 2 + _BLOCK_SIZE // 2)
    scale = torch.from_numpy(_copy(blocks[..., :2]).view(np.float16)[..., 0])
    # A multiple by a power of two is exact; in float32 it does not overflow either.
    return GridWeight(_unpack_nibbles(blocks[..., 2:]), scale, -8 * scale.float(), _BLOCK_SIZE)


def _decode_q4_1(data: np.ndarray[Any, np.dtype[np.uint8]]) -> GridWeight:
    """Blocks of fp16 scale, fp16 minimum and 16 bytes: w = scale * code + minimum."""
    blocks = data.reshape(data.shape[0], -1, 4 + _BLOCK_SIZE // 2)
    scale, minimum = (_copy(blocks[..., place : place + 2]).view(np.float16)[..., 0] for place in (0, 2))
    return GridWeight(
        codes=_unpack_nibbles(blocks[..., 4:]),
        scale=torch.from_numpy(scale),
        minimum=torch.from_numpy(minimum),
        group_size=_BLOCK_SIZE,
    )


def _decode_q5_0(data: np.ndarray[Any, np.dtype[np.uint8]]) -> GridWeight:
    """Blocks of fp16 scale, 32 fifth bits and 16 bytes as in Q4_1: w = scale * (code - 16)."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, 6 + _BLOCK_SIZE // 2)
    fifth = np.unpackbits(_copy(blocks[..., 2:6]), axis=-1, bitorder="little").reshape(rows, -1)
    codes = _unpack_nibbles(blocks[..., 6:]).numpy() | fifth << 4
    return _signed(codes.astype(np.int8) - 16, _halves(blocks[..., :2]))


def _decode_iq4_nl(data: np.ndarray[Any, np.dtype[np.uint8]]) -> GridWeight:
    """Blocks as Q4_0's; a code says which of sixteen values: w = scale * value."""
    blocks = data.reshape(data.shape[0], -1, 2 + _BLOCK_SIZE // 2)
    values = np.array(_IQ4_VALUES, np.int8)[_unpack_nibbles(blocks[..., 2:]).numpy()]
    return _signed(values, _halves(blocks[..., :2]))


def _decode_mxfp4(data: np.ndarray[Any, np.dtype[np.uint8]]) -> GridWeight:
    """Blocks of an exponent and 16 bytes of E2M1 codes: w = 2^(exponent - 128) * twice the value."""
    blocks = data.reshape(data.shape[0], -1, 1 + _BLOCK_SIZE // 2)
    values = np.array(_E2M1_TWICE, np.int8)[_unpack_nibbles(blocks[..., 1:]).numpy()]
    return _signed(values, torch.from_numpy(np.exp2(blocks[..., 0].astype(np.float32) - 128)))


def _signed(codes: np.ndarray[Any, np.dtype[np.int8]], scale: torch.Tensor) -> GridWeight:
    return GridWeight(torch.from_numpy(np.ascontiguousarray(codes)), scale, None, _BLOCK_SIZE)


def _halves(data: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
    """[N, blocks, 2] bytes → [N, blocks] fp16."""
    return torch.from_numpy(_copy(data).view(np.float16)[..., 0])


def _copy(data: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Contiguous, and never a view of the file."""
    return np.array(data, order="C")


def _unpack_nibbles(packed: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
    """[N, blocks, 16] → [N, K] uint8 of 0..15: byte i of a block holds elements i (low bits) and i + 16."""
    rows, num_blocks, size = packed.shape
    codes = np.empty((rows, num_blocks, 2, size), dtype=np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[:, :, 0])
    np.right_shift(packed, 4, out=codes[:, :, 1])
    return torch.from_numpy(codes.reshape(rows, -1))


def _decode_q8_0(data: np.ndarray[Any, np.dtype[np.uint8]]) -> GridWeight:
    """Blocks of fp16 scale and 32 signed bytes."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, 2 + _BLOCK_SIZE)
    return GridWeight(
        codes=torch.from_numpy(_copy(blocks[..., 2:]).view(np.int8).reshape(rows, -1)),
        scale=torch.from_numpy(_copy(blocks[..., :2]).view(np.float16)[..., 0]),
        minimum=None,
        group_size=_BLOCK_SIZE,
    )


_DECODERS: dict[GGMLQuantizationType, Callable[[np.ndarray[Any, np.dtype[np.uint8]]], GridWeight]] = {
    GGMLQuantizationType.Q8_0: _decode_q8_0,
    GGMLQuantizationType.Q4_0: _decode_q4_0,
    GGMLQuantizationType.Q4_1: _decode_q4_1,
    GGMLQuantizationType.Q5_0: _decode_q5_0,
    GGMLQuantizationType.IQ4_NL: _decode_iq4_nl,
    GGMLQuantizationType.MXFP4: _decode_mxfp4,
}
"""By type, what makes a grid of rows of blocks."""
