"""A GGUF file as a Checkpoint: Hugging Face tensor names, row order and conventions."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize

from engine.errors import CheckpointError
from engine.loading.gguf.blocks import DECODERS, read_blocks
from engine.loading.gguf.config import translate_config, translate_generation_config
from engine.loading.gguf.file import GGUFFile
from engine.loading.slices import check_shape, take_slices
from engine.models.modules import ROLES
from engine.parallel.shards import WHOLE, Slices
from engine.quant.block_weight import BLOCK_TYPES
from engine.quant.weight import Weight, take_rows
from engine.quant_spec import EMBEDDING, LM_HEAD, SchemeSpec, parse_scheme_spec

logger = logging.getLogger(__name__)

_FLOAT_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# Read as float32: there is no product for their codes.
_OTHER_TYPES = (
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.TQ1_0,
    GGMLQuantizationType.TQ2_0,
    GGMLQuantizationType.IQ1_S,
    GGMLQuantizationType.IQ1_M,
    GGMLQuantizationType.IQ2_XXS,
    GGMLQuantizationType.IQ2_XS,
    GGMLQuantizationType.IQ2_S,
    GGMLQuantizationType.IQ3_XXS,
    GGMLQuantizationType.IQ3_S,
)
_RUNS_AS = "int8:g32"

_ROUNDING = (
    "rounding them to eight bits in groups of 32 moves them by 0.5 % (RMS); --quant none makes floats of them"
)

_SUPPORTED_TYPES = (*_FLOAT_TYPES, *DECODERS, *_OTHER_TYPES)

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
        self._gguf_names = _hugging_face_names(self._file)
        for gguf_name in self._gguf_names.values():
            _check_type(self._file, self._file.tensors[gguf_name])
        self._file.forget_values()

    @property
    def generation_config(self) -> dict[str, Any]:
        try:
            return translate_generation_config(self._file)
        finally:
            self._file.forget_values()

    @property
    def recommended_params(self) -> dict[str, Any]:
        return {}

    def names(self) -> set[str]:
        return set(self._gguf_names)

    def other_names(self) -> set[str]:
        return set()

    def auto_schemes(self, modules: Iterable[str]) -> dict[str, SchemeSpec]:
        """What `--quant auto` makes of some modules: what keeps them as they are stored here, or next to it.

        Modules that share a product, of which one is of floats, are floats.
        """
        schemes = {
            module: parse_scheme_spec(_scheme(self._file.tensors[self._gguf_names[f"{module}.weight"]]))
            for module in modules
            if f"{module}.weight" in self._gguf_names
        }
        for layer in range(self.config["num_hidden_layers"]):
            for role in ROLES:
                shared = [module for module in role.modules(f"model.layers.{layer}") if module in schemes]
                if len({schemes[module].kind == "none" for module in shared}) > 1:
                    schemes |= dict.fromkeys(shared, parse_scheme_spec("none"))
        if self.config["tie_word_embeddings"] and EMBEDDING in schemes:
            schemes[LM_HEAD] = schemes[EMBEDDING]
        self._log_rounded()
        return schemes if any(words.kind != "none" for words in schemes.values()) else {}

    def _log_rounded(self) -> None:
        """Says which types `--quant auto` does not keep to the bit."""
        kinds = Counter(
            tensor.tensor_type.name
            for tensor in self._file.tensors.values()
            if tensor.tensor_type in _OTHER_TYPES and len(tensor.shape) > 1
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
        return take_rows(weight, index)

    def _read(self, tensor: ReaderTensor, part: Slices) -> Weight:
        """A part, rows in the file's order."""
        kind, data = tensor.tensor_type, tensor.data
        if part.rows is not None:
            data = data[part.rows]
        if part.columns is None:
            return self._decode(kind, data)
        block_size = GGML_QUANT_SIZES[kind][0]
        whole = _widened(part.columns, block_size)
        if whole != part.columns and kind in DECODERS and block_size == 32:
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
    if data.ndim == 2 and kind in DECODERS:
        return read_blocks(data.reshape(len(data), -1, GGML_QUANT_SIZES[kind][1]), kind)
    return torch.from_numpy(dequantize(np.ascontiguousarray(data), kind))


def _scheme(tensor: ReaderTensor) -> str:
    """What keeps a matrix as it is stored, or next to it."""
    kind = tensor.tensor_type
    if kind in _FLOAT_TYPES:
        return "none"
    name = kind.name.lower()
    return name if name in BLOCK_TYPES else _RUNS_AS
