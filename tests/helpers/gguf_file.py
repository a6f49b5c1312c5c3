"""Small GGUF files, written by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

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
