"""GGUF metadata translated into the keys of a Hugging Face config.json and generation_config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.loading.gguf.file import GGUFFile

# GGUF architecture -> (model_type, class name). Mistral's GGUF files say "llama".
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

# Control tokens that end a turn or a document. Metadata names at most a few of those a model emits.
_END_TOKENS = frozenset(
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
    ]
)
_CONTROL = 3

# What every published Llama 3 with rope scaling uses; only the factor varies.
_LLAMA3_LOW_FREQUENCY_FACTOR = 1.0
_LLAMA3_HIGH_FREQUENCY_FACTOR = 4.0
_LLAMA3_ORIGINAL_LENGTH = 8192

_GEMMA3_LOCAL_ROPE_THETA = 10000.0
_GEMMA3_SLIDING_WINDOW_PATTERN = 6
_GEMMA3_27B_LAYERS = 62


def translate_config(file: GGUFFile) -> dict[str, Any]:
    """The file's metadata as a config.json dictionary.

    Raises:
        CheckpointError: An unsupported architecture, a missing key, or a rope scaling that config.json
            has no words for.
    """
    if file.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {file.architecture!r} is not supported"
            f" (supported: {', '.join(ARCHITECTURES)})"
        )
    model_type, class_name = ARCHITECTURES[file.architecture]
    heads = _scalar(file, "attention.head_count")
    hidden_size = _scalar(file, "embedding_length")
    head_dim = _scalar(file, "attention.key_length", hidden_size // heads)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": _scalar(file, "feed_forward_length"),
        "num_hidden_layers": _scalar(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _scalar(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _scalar(file, "context_length"),
        "rms_norm_eps": _scalar(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _scalar(file, "rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "hidden_act": "silu",
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
    }
    rotary_dim = _scalar(file, "rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise CheckpointError(
            f"{file.path}: rotary embedding over {rotary_dim} of {head_dim} dimensions is not supported"
        )
    if file.architecture == "gemma3":
        config |= _gemma3_config(file, config)
    elif f"{file.architecture}.attention.sliding_window" in file:
        config["sliding_window"] = _scalar(file, "attention.sliding_window")
    return config


def translate_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The file's metadata as a generation_config.json dictionary: its token ids."""
    return {
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_token_ids(file),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }


def end_token_ids(file: GGUFFile) -> list[int]:
    """The ids that end a generation, the one that metadata calls end-of-sequence first."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [file.get(f"tokenizer.ggml.{key}") for key in keys]
    types = file.get("tokenizer.ggml.token_type", [])
    tokens = file.get("tokenizer.ggml.tokens", [])
    known = [
        token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and token in _END_TOKENS
    ]
    return list(dict.fromkeys(token_id for token_id in [*named, *known] if token_id is not None))


def _scalar(file: GGUFFile, key: str, default: float | None = None) -> Any:
    """A number of the architecture; per-layer values are accepted only where all layers agree."""
    name = f"{file.architecture}.{key}"
    value = file[name] if default is None else file.get(name, default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise CheckpointError(f"{file.path}: {name} differs between layers, which is not supported")
        value = value[0]
    # Metadata floats are float32; the shortest decimal that gives the same float32 is the one that
    # config.json holds (1e-05, not 9.999999747378752e-06).
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _gemma3_config(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    pattern = _scalar(file, "attention.sliding_window_pattern", _GEMMA3_SLIDING_WINDOW_PATTERN)
    # The attention scale is not in the metadata. It is the head size for all but the 27B model.
    is_27b = layers == _GEMMA3_27B_LAYERS
    scale = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "rope_local_base_freq": _scalar(file, "rope.freq_base_swa", _GEMMA3_LOCAL_ROPE_THETA),
        "sliding_window": _scalar(file, "attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)
        ],
    }


def _rope_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope_scaling(file, head_dim)
    kind = file.get(f"{file.architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _scalar(file, "rope.scaling.factor")}
    if kind == "yarn":
        original = _scalar(file, "rope.scaling.original_context_length")
        return {**scaling, "original_max_position_embeddings": original}
    if kind == "linear":
        return scaling
    raise CheckpointError(f"{file.path}: rope scaling {kind!r} is not supported")


def _llama3_rope_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    """Llama 3's parameters behind the tensor of frequency divisors, checked against that tensor."""
    stored = np.asarray(file.tensors["rope_freqs.weight"].data, dtype=np.float32)
    factor = float(stored.max())
    theta = _scalar(file, "rope.freq_base", 10000.0)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high = _LLAMA3_LOW_FREQUENCY_FACTOR, _LLAMA3_HIGH_FREQUENCY_FACTOR
    smooth = np.clip((_LLAMA3_ORIGINAL_LENGTH / wavelengths - low) / (high - low), 0.0, 1.0)
    divisors = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != divisors.shape or not np.allclose(stored, divisors, rtol=1e-4):
        raise CheckpointError(f"{file.path}: tensor 'rope_freqs.weight' holds no known Llama 3 rope scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_LENGTH,
    }
