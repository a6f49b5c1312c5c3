"""A GGUF file as a Checkpoint: Hugging Face tensor names, row order and conventions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize

from engine.errors import CheckpointError
from engine.loading.gguf_config import translate_config, translate_generation_config
from engine.loading.gguf_file import GGUFFile
from engine.quant.weight import GridWeight, Weight

_BLOCK_SIZE = 32

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
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
        self.path = path
        self._file = GGUFFile(path)
        self.config: dict[str, Any] = translate_config(self._file)
        self.generation_config: dict[str, Any] = translate_generation_config(self._file)
        self._gguf_names = _hugging_face_names(self._file)

    def names(self) -> set[str]:
        return set(self._gguf_names)

    def tensor(self, name: str) -> Weight:
        gguf_name = self._gguf_names.get(name)
        if gguf_name is None:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        weight = _decode(self._file, self._file.tensors[gguf_name])
        if self._file.architecture == "llama" and ".attn_q." in gguf_name:
            return _half_rotation_order(weight, self.config["num_attention_heads"])
        if self._file.architecture == "llama" and ".attn_k." in gguf_name:
            return _half_rotation_order(weight, self.config["num_key_value_heads"])
        if self._file.architecture == "gemma3" and gguf_name.endswith("norm.weight"):
            # GGUF stores w + 1, the factor that Gemma multiplies by.
            assert isinstance(weight, torch.Tensor)
            return weight - 1
        return weight


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


def _decode(file: GGUFFile, tensor: ReaderTensor) -> Weight:
    """The tensor as float or on its grid, [N, K] or [N], independent of the file's memory map."""
    kind, data = tensor.tensor_type, tensor.data
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return torch.from_numpy(np.array(data))
    if kind == GGMLQuantizationType.BF16:
        return torch.from_numpy(np.array(data)).view(torch.bfloat16)
    if kind == GGMLQuantizationType.Q4_1 and data.ndim == 2:
        return _decode_q4_1(data)
    if kind == GGMLQuantizationType.Q8_0 and data.ndim == 2:
        return _decode_q8_0(data)
    try:
        return torch.from_numpy(dequantize(data, kind))
    except NotImplementedError as error:
        raise CheckpointError(
            f"{file.path}: tensor {tensor.name!r} has type {kind.name}, which cannot be dequantized"
        ) from error


def _decode_q4_1(data: np.ndarray[Any, np.dtype[np.uint8]]) -> GridWeight:
    """Blocks of fp16 scale, fp16 minimum and 16 bytes: byte i holds elements i (low bits) and i + 16."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, 4 + _BLOCK_SIZE // 2)
    packed = blocks[..., 4:]
    codes = np.empty((rows, blocks.shape[1], 2, _BLOCK_SIZE // 2), dtype=np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[:, :, 0])
    np.right_shift(packed, 4, out=codes[:, :, 1])
    parameters = np.ascontiguousarray(blocks[..., :4]).view(np.float16)
    return GridWeight(
        codes=torch.from_numpy(codes.reshape(rows, -1)),
        scale=torch.from_numpy(np.ascontiguousarray(parameters[..., 0])),
        minimum=torch.from_numpy(np.ascontiguousarray(parameters[..., 1])),
        group_size=_BLOCK_SIZE,
    )


def _decode_q8_0(data: np.ndarray[Any, np.dtype[np.uint8]]) -> GridWeight:
    """Blocks of fp16 scale and 32 signed bytes."""
    rows = data.shape[0]
    blocks = data.reshape(rows, -1, 2 + _BLOCK_SIZE)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)
    return GridWeight(
        codes=torch.from_numpy(codes.reshape(rows, -1)),
        scale=torch.from_numpy(scale.reshape(rows, -1)),
        minimum=None,
        group_size=_BLOCK_SIZE,
    )


def _half_rotation_order(weight: Weight, heads: int) -> Weight:
    """Rows of a llama-architecture Q or K projection (or its bias) in Hugging Face's order.

    GGUF keeps the two rows that rotate together side by side; Hugging Face keeps them half a head apart.
    """
    index = torch.arange(weight.shape[0]).view(heads, -1, 2).transpose(1, 2).reshape(-1)
    return weight.rows(index) if isinstance(weight, GridWeight) else weight[index]
