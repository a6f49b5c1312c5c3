"""GGUF metadata translated into the keys of a Hugging Face config.json and generation_config.json."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.loading.gguf.file import GGUFFile

logger = logging.getLogger(__name__)

# GGUF architecture -> (model_type, class name). Mistral's GGUF files say "llama".
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

# What ends a turn or a document, whatever type a file says it has: metadata names at most a few of those that a model
# emits.
_END_MARKS = frozenset(
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<end_of_turn>",
        "<turn|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[e~[",
    ]
)
# The same, but only as a control token: in other vocabularies it is text, a tag of HTML.
_END_WORDS = frozenset(["</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|tool_response>"])
_NORMAL, _CONTROL = 1, 3

# What every published Llama 3 with rope scaling uses; only the factor varies.
_LLAMA3_LOW_FREQUENCY_FACTOR = 1.0
_LLAMA3_HIGH_FREQUENCY_FACTOR = 4.0
_LLAMA3_ORIGINAL_LENGTH = 8192

# Of keys and values, in all layers and in those with a window.
_HEAD_SIZES = (
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
)

_GEMMA3_LOCAL_ROPE_THETA = 10000.0
_GEMMA3_SLIDING_WINDOW_PATTERN = 6
_GEMMA3_27B_LAYERS = 62

_YARN_BETA = {"beta_fast": 32.0, "beta_slow": 1.0}


# Keys of an architecture's own name space that change nothing here.
_HARMLESS = frozenset(
    [
        "vocab_size",  # the embedding's table has it
        "tensor_data_layout",
        "pooling_type",  # of embeddings
        "rope.scaling.finetuned",
        "attention.layer_norm_epsilon",  # of norms that these architectures do not have
    ]
)
# Keys that change nothing with one of these values, and with others make a model that these families are not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.shared_kv_layers": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_attn_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def translate_config(file: GGUFFile) -> dict[str, Any]:
    """The file's metadata as a config.json dictionary.

    Raises:
        CheckpointError: An unsupported architecture, a missing key, or one that makes a model which config.json has
            no words for.
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
        "bos_token_id": token_id(file, "bos_token_id"),
        "eos_token_id": token_id(file, "eos_token_id"),
    }
    for key in ("rope.dimension_count", "rope.dimension_count_swa", *_HEAD_SIZES):
        size = _scalar(file, key, head_dim)
        if size != head_dim:
            raise CheckpointError(
                f"{file.path}: {file.architecture}.{key}: expected the size of a head, {head_dim}, found {size}"
            )
    scale = _scalar(file, "attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise CheckpointError(
            f"{file.path}: {file.architecture}.attention.scale: expected {head_dim**-0.5:.6g}, found {scale:.6g}"
        )
    if file.architecture == "gemma3":
        config |= _gemma3_config(file, config)
    else:
        config |= _window(file, config)
    _check_keys(file)
    return config


def _window(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """How far attention sees: of the files that say "llama", those of Mistral's first models have a window."""
    length = config["max_position_embeddings"]
    window = _scalar(file, "attention.sliding_window", 0)
    if not 0 < window < length:
        return {}
    if file.architecture != "llama":
        raise CheckpointError(
            f"{file.path}: {file.architecture}.attention.sliding_window: expected none, or at least the context of "
            f"{length}, found {window}: the file does not say in which layers it holds"
        )
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _check_keys(file: GGUFFile) -> None:
    """Refuses keys of the architecture that nobody has read, unless they change nothing."""
    start = f"{file.architecture}."
    for key in sorted(file.unread_keys(start)):
        name = key.removeprefix(start)
        if name in _HARMLESS:
            continue
        value = _scalar(file, name)
        if name not in _NEUTRAL or value not in _NEUTRAL[name]:
            raise CheckpointError(
                f"{file.path}: metadata key {key!r} ({value!r}) makes another model than the "
                f"{file.architecture} that is supported here"
            )


def translate_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The file's metadata as a generation_config.json dictionary: its token ids."""
    return {
        "bos_token_id": token_id(file, "bos_token_id"),
        "eos_token_id": end_token_ids(file),
        "pad_token_id": token_id(file, "padding_token_id"),
    }


def end_token_ids(file: GGUFFile) -> list[int]:
    """The ids that end a generation, the one that metadata calls end-of-sequence first."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [token_id(file, key) for key in keys]
    tokens = file.get("tokenizer.ggml.tokens", [])
    types = file.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    known = [
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if token in _END_MARKS or (token in _END_WORDS and kind == _CONTROL)
    ]
    return list(dict.fromkeys(index for index in [*named, *known] if index is not None))


def token_id(file: GGUFFile, key: str) -> int | None:
    """The id of a token with a role, "bos_token_id" for one; None if the file says none, or one that is no token."""
    index = file.get(f"tokenizer.ggml.{key}")
    if index is None or not isinstance(index, int):
        return None
    num_tokens = file.num_strings("tokenizer.ggml.tokens")
    if num_tokens is not None and not 0 <= index < num_tokens:
        logger.warning("%s: tokenizer.ggml.%s: %d is no token: left out", file.path, key, index)
        return None
    return index


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
    pattern = file.get(
        f"{file.architecture}.attention.sliding_window_pattern", _GEMMA3_SLIDING_WINDOW_PATTERN
    )
    is_listed = isinstance(pattern, list)
    slides = pattern if is_listed else [bool((layer + 1) % pattern) for layer in range(layers)]
    # The attention scale is not in the metadata. It is the head size for all but the 27B model.
    is_27b = layers == _GEMMA3_27B_LAYERS
    scale = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "rope_local_base_freq": _scalar(file, "rope.freq_base_swa", _GEMMA3_LOCAL_ROPE_THETA),
        "sliding_window": _scalar(file, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }


def _rope_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any] | None:
    """The scaling as llama.cpp reads it: a factor without a type is linear, and has an older name, too."""
    factor = _scalar(file, "rope.scaling.factor", 0.0) or _scalar(file, "rope.scale_linear", 0.0)
    kind = file.get(f"{file.architecture}.rope.scaling.type", "linear")
    attention_factor = _scalar(file, "rope.scaling.attn_factor", 1.0)
    original = _scalar(file, "rope.scaling.original_context_length", _scalar(file, "context_length"))
    beta = {name: _scalar(file, f"rope.scaling.yarn_{name}", default) for name, default in _YARN_BETA.items()}
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{file.path}: rope scaling {kind!r} is not supported")
    if kind != "yarn" and attention_factor != 1.0:
        raise CheckpointError(
            f"{file.path}: {file.architecture}.rope.scaling.attn_factor: expected 1 for rope scaling {kind!r}, "
            f"found {attention_factor}"
        )
    if "rope_freqs.weight" in file.tensors:
        if kind != "none" and factor not in (0.0, 1.0):
            raise CheckpointError(
                f"{file.path}: rope_freqs.weight and rope scaling by {factor}: expected one of them"
            )
        return _llama3_rope_scaling(file, head_dim)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    scaling = {"rope_type": kind, "factor": factor or 1.0}
    if kind == "linear":
        return scaling
    scaling["original_max_position_embeddings"] = original
    scaling |= {name: value for name, value in beta.items() if value != _YARN_BETA[name]}
    if attention_factor != 1.0:
        # It multiplies what YaRN has anyway.
        usual = 0.1 * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0
        scaling["attention_factor"] = attention_factor * usual
    return scaling


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
