"""ModelConfig: what distinguishes one decoder from another, read from a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Of each type, the numbers that it needs; and those that YaRN may have.
_ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL_ROPE_NUMBERS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")

# What transformers' configurations assume of a key that is left out, where published files do leave it out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "max_window_layers": 28,
    },
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_window_layers": 28,
    },
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of a kind of layer.

    Attributes:
        theta: Base of the frequencies.
        scaling: config.json's scaling entry: "rope_type" and its numbers; empty for none.
    """

    theta: float
    scaling: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama kind, with the points where its families differ.

    Attributes:
        sliding_windows: Per layer, how many tokens back a token sees, itself included; None for all.
        ropes: Per layer.
        attention_scale: Factor of the query-key products before the softmax.
        has_qkv_bias, has_output_bias, has_mlp_bias: Which linear layers add a bias.
        has_query_key_norm: RMSNorm over each head's queries and keys (Qwen3, Gemma 3).
        has_post_norms: Norms after attention and MLP too, before their residual sums (Gemma 3).
        norm_offset: Added to every norm's stored weight (Gemma stores w - 1).
        embedding_scale: Factor of the token embeddings (Gemma: sqrt(hidden_size)).
        activation: "silu" or "gelu_tanh".
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]
    ropes: tuple[RopeConfig, ...]
    attention_scale: float
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_query_key_norm: bool
    has_post_norms: bool
    norm_offset: float
    embedding_scale: float
    activation: str
    ties_embeddings: bool

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads config.json's keys, in the spellings of transformers 4 and 5.

        Raises:
            CheckpointError: A family, rope type or activation that is not implemented, or a missing key.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise CheckpointError(
                f"config.json: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        config = {**_DEFAULTS.get(family, {}), **config}
        _check_values(config)
        try:
            return cls._from_known_family(family, config)
        except KeyError as error:
            raise CheckpointError(f"config.json: key {error} is missing for model_type {family!r}") from error

    @classmethod
    def _from_known_family(cls, family: str, config: dict[str, Any]) -> ModelConfig:
        num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
        hidden_size = config["hidden_size"]
        head_dim = config.get("head_dim") or hidden_size // num_heads
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json: num_key_value_heads: expected a divisor of {num_heads} heads, found {num_kv_heads}"
            )
        if head_dim < 2 or head_dim % 2:
            raise CheckpointError(f"config.json: head_dim: expected an even number, found {head_dim}")
        is_gemma = family == "gemma3_text"
        layer_types = _layer_types(family, config)
        windows = tuple(
            config["sliding_window"] if kind == "sliding_attention" else None for kind in layer_types
        )
        attention_scale = config.get("query_pre_attn_scalar", head_dim) if is_gemma else head_dim
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(cap) is not None:
                raise CheckpointError(f"config.json: {cap} is not supported, got {config[cap]}")
        return cls(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=config["intermediate_size"],
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_epsilon=float(config["rms_norm_eps"]),
            max_position_embeddings=config["max_position_embeddings"],
            sliding_windows=windows,
            ropes=tuple(_rope(config, kind) for kind in layer_types),
            attention_scale=attention_scale**-0.5,
            # Qwen2 has them whatever attention_bias says.
            has_qkv_bias=family == "qwen2" or bool(config.get("attention_bias")),
            has_output_bias=family != "qwen2" and bool(config.get("attention_bias")),
            has_mlp_bias=bool(config.get("mlp_bias")),
            has_query_key_norm=family in ("qwen3", "gemma3_text"),
            has_post_norms=is_gemma,
            norm_offset=1.0 if is_gemma else 0.0,
            embedding_scale=hidden_size**0.5 if is_gemma else 1.0,
            activation=_activation(config),
            ties_embeddings=config.get("tie_word_embeddings", is_gemma),
        )


def _is_count(value: Any, most: int = 2**31) -> bool:
    return type(value) is int and 0 < value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window", "sliding_window_pattern")
_MAX_LAYERS = 10_000

# By key: what it must be, if it is there, and how that is called.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_SIZES, (_is_count, "a positive integer")),
    **dict.fromkeys(
        _OPTIONAL_SIZES, (lambda value: value is None or _is_count(value), "a positive integer or null")
    ),
    "num_hidden_layers": (lambda value: _is_count(value, _MAX_LAYERS), f"an integer of 1 to {_MAX_LAYERS}"),
    "max_window_layers": (lambda value: type(value) is int and value >= 0, "an integer of 0 or more"),
    **dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
        (_is_number, "a positive number"),
    ),
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"),
        (_is_flag, "true or false"),
    ),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (_is_object, "an object or null")),
    **dict.fromkeys(
        ("hidden_act", "hidden_activation"), (lambda value: isinstance(value, str | None), "a name")
    ),
}


def _check_values(config: dict[str, Any]) -> None:
    """
    Raises:
        CheckpointError: A value is of another type, or out of range.
    """
    for key, (is_expected, words) in _EXPECTED.items():
        if key in config and not is_expected(config[key]):
            raise CheckpointError(f"config.json: {key}: expected {words}, found {config[key]!r}")


def _layer_types(family: str, config: dict[str, Any]) -> list[str]:
    """ "full_attention" or "sliding_attention" for each layer."""
    num_layers = config["num_hidden_layers"]
    if config.get("layer_types"):
        layer_types = config["layer_types"]
        known = ("full_attention", "sliding_attention")
        is_list = isinstance(layer_types, list) and len(layer_types) == num_layers
        if not is_list or any(kind not in known for kind in layer_types):
            raise CheckpointError(
                f"config.json: layer_types: expected {' or '.join(known)} for each of {num_layers} layers, "
                f"found {layer_types!r}"
            )
        if "sliding_attention" in layer_types and config.get("sliding_window") is None:
            raise CheckpointError("config.json: sliding_window: expected a positive integer, found none")
        return list(layer_types)
    window = config.get("sliding_window")
    if family == "gemma3_text":
        pattern = config.get("sliding_window_pattern", 6)
        return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)]
    if family == "mistral" and window is not None:
        return ["sliding_attention"] * num_layers
    if family in ("qwen2", "qwen3") and window is not None and config.get("use_sliding_window", False):
        first = config.get("max_window_layers", 0)
        return ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return ["full_attention"] * num_layers


def _rope(config: dict[str, Any], layer_type: str) -> RopeConfig:
    """The rotary embedding of a layer type, from `rope_parameters` (transformers 5) or the older keys."""
    parameters = config.get("rope_parameters") or {}
    if isinstance(parameters.get(layer_type), dict):
        parameters = parameters[layer_type]
    if "rope_theta" in parameters:
        theta, scaling = parameters["rope_theta"], dict(parameters)
    elif layer_type == "sliding_attention" and "rope_local_base_freq" in config:
        theta, scaling = config["rope_local_base_freq"], {}
    else:
        theta, scaling = config.get("rope_theta", 10000.0), dict(config.get("rope_scaling") or {})
    if not _is_number(theta):
        raise CheckpointError(f"config.json: rope_theta: expected a positive number, found {theta!r}")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return RopeConfig(float(theta))
    scaling["rope_type"] = kind
    scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    for key in _ROPE_NUMBERS[kind]:
        if not _is_number(scaling.get(key)):
            raise CheckpointError(
                f"config.json: {key} of rope type {kind!r}: expected a positive number, found {scaling.get(key)!r}"
            )
    for key in _OPTIONAL_ROPE_NUMBERS:
        if scaling.get(key) is not None and not _is_number(scaling[key]):
            raise CheckpointError(f"config.json: {key}: expected a positive number, found {scaling[key]!r}")
    numbers = {
        key: value
        for key, value in scaling.items()
        if key not in ("type", "rope_theta") and isinstance(value, (int, float, str))
    }
    return RopeConfig(float(theta), tuple(sorted(numbers.items())))


def _activation(config: dict[str, Any]) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    names = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in names:
        raise CheckpointError(
            f"config.json: hidden_act {name!r} is not supported; supported are {', '.join(names)}"
        )
    return names[name]
