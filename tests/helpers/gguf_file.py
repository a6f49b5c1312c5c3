"""Small GGUF files, written by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.models.modules import ROLES
from engine.tokenizer.files import byte_tokenizer
from tests.helpers.tiny import randomize

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCAB = 4, 2, 16, 64, 96, 40

Float = np.ndarray
Tensor = Float | tuple[Float, gguf.GGMLQuantizationType]
"""Floats, or bytes and what they are."""


def write_gguf(
    path: Path,
    architecture: str = "llama",
    tensors: dict[str, Tensor] | None = None,
    metadata: dict[str, Any] | None = None,
    **named_metadata: object,
) -> Path:
    """Writes a GGUF file with an embedding, the given tensors and metadata; returns its path.

    Args:
        metadata: Values by their whole keys.
        named_metadata: Values by what the writer's functions call them.
    """
    writer = gguf.GGUFWriter(path, architecture)
    defaults = {
        "block_count": 12,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "head_count": HEADS,
        "head_count_kv": KV_HEADS,
        "key_length": HEAD_DIM,
        "context_length": 512,
        "layer_norm_rms_eps": 1e-5,
    }
    for key, value in (defaults | named_metadata).items():
        getattr(writer, f"add_{key}")(value)
    for key, value in (metadata or {}).items():
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    embedding = np.random.default_rng(0).standard_normal((VOCAB, HIDDEN), dtype=np.float32)
    for name, tensor in {"token_embd.weight": embedding, **(tensors or {})}.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{projection.name: projection.gguf for role in ROLES for projection in role.projections},
}


def write_gguf_model(
    path: Path,
    config: PreTrainedConfig,
    kind: gguf.GGMLQuantizationType | None = None,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Writes a llama with random weights and a tokenizer of bytes, as llama.cpp's converter names and orders them.

    Args:
        kind: Of the matrices; None: floats.
        kinds: Of the matrices whose GGUF names hold a word.

    Returns:
        The model of floats that it was made of.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += ["ab", *(f"<{index}>" for index in range(len(tokens) + 1, config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module, _, part = name.rpartition(".")
        layer = module.split(".")[2] if module.startswith("model.layers.") else None
        local = module if layer is None else module.split(".", 3)[3]
        if local == "lm_head" and config.tie_word_embeddings:
            continue
        short = _TENSORS[local]
        data = tensor.numpy()
        if short in heads:
            rows = len(data) // heads[short] // 2
            data = data.reshape(heads[short], 2, rows, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        stored = f"{short}.{part}" if layer is None else f"blk.{layer}.{short}.{part}"
        of_tensor = next((one for word, one in (kinds or {}).items() if word in stored), kind)
        if data.ndim == 1 or of_tensor is None:
            writer.add_tensor(stored, data.astype(np.float32))
        else:
            writer.add_tensor(stored, quantize(data, of_tensor), raw_dtype=of_tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
