"""What options mean on a given device: "auto" resolved, and what a chip cannot do refused."""

from __future__ import annotations

from typing import Any

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels import cpu
from engine.kernels.attention.kv_layer import INT4
from engine.kernels.launch import Target

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_DTYPES = DTYPES | {"int8": torch.int8, "int4": INT4, "fp8_e4m3": torch.float8_e4m3fn}


def resolve_device(config: EngineConfig) -> torch.device:
    """Where the model runs.

    Raises:
        ConfigError: A GPU was asked for, and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch finds no GPU; use --device cpu")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def resolve_dtype(config: EngineConfig, model: dict[str, Any], on_cpu: bool) -> torch.dtype:
    """The activations' type.

    Args:
        model: The keys of config.json.

    Raises:
        ConfigError: On a CPU, quantized products take and return float32.
    """
    if on_cpu and config.quant_spec.is_quantized and config.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"dtype: {config.dtype} is for --quant none on a CPU; {config.quant} computes in float32, use auto"
        )
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if on_cpu:
        return torch.float32
    name = model.get("dtype") or model.get("torch_dtype") or "bfloat16"
    # float32 checkpoints run in bf16 on a GPU: few are meant to be served in full precision.
    return DTYPES[name] if name in ("bfloat16", "float16") else torch.bfloat16


def resolve_cache_dtype(config: EngineConfig, dtype: torch.dtype, target: Target | None) -> torch.dtype:
    """The type of cached keys and values.

    Args:
        dtype: The activations'.
        target: The chip; None for the CPU's own bodies.

    Raises:
        ConfigError: The chip lacks it.
    """
    if (
        config.kv_cache_dtype == "fp8_e4m3"
        and target is not None
        and target.arch in ("sm_80", "sm_86", "sm_87")
    ):
        raise ConfigError(
            f"kv_cache_dtype: fp8_e4m3 needs an sm_89 or newer, this is {target.arch}; use int8, which is as small"
        )
    if config.kv_cache_dtype == "auto" and target is None and config.quant_spec.is_quantized:
        return torch.int8  # the least to read, and attention in integer products; its price is in the README
    return CACHE_DTYPES.get(config.kv_cache_dtype, dtype)


def describe_cpu(dtype: torch.dtype) -> str:
    """What computes on a CPU, and whether a token depends on its chunk there, in one line."""
    if dtype == torch.float32:
        return cpu.describe()
    name = str(dtype).removeprefix("torch.")
    return f"torch's operators for {name}, whose results depend on how a prompt was cut into chunks: float32 is exact"
