"""Small GGUF files, written by the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCAB = 4, 2, 16, 64, 96, 40

Float = np.ndarray
Tensor = Float | tuple[Float, gguf.GGMLQuantizationType]
"""Floats, or bytes and what they are."""


def write_gguf(
    path: Path, architecture: str = "llama", tensors: dict[str, Tensor] | None = None, **metadata: object
) -> Path:
    """Writes a GGUF file with an embedding, the given tensors and metadata; returns its path."""
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
    for key, value in (defaults | metadata).items():
        getattr(writer, f"add_{key}")(value)
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
