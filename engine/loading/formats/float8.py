"""FP8 (E4M3, https://arxiv.org/abs/2209.05433): a byte a weight, and scales that it is multiplied by.

quant_method "fp8"         weight [N, K], weight_scale_inv [ceil(N / b), ceil(K / b)]: DeepSeek's blocks of
                           `weight_block_size`; or weight_scale, one number, where there is no such setting
"fbgemm_fp8"               weight [N, K], weight_scale [N, 1]
"modelopt" (NVIDIA's, also weight [N, K], weight_scale: one number, [N] for FP8_PER_CHANNEL_PER_TOKEN, blocks of 128
in hf_quant_config.json)   for FP8_PB_WO

All of them mean w[n, k] = weight[n, k] * scale of n, k; the shape of the scales says what shares one. Scales of
activations are not read: quantized activations are the engine's own matter.

No scheme multiplies FP8 codes. `--quant auto` rounds them to int8:g32, which is as small: of normal weights that adds
4 % to the squared error that FP8 has made, of Student's t with four degrees of freedom 8 % (int8:g128: 6 and 16 %).
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.loading.formats.stored import FLOATS, Settings, StoredModule, is_left_out
from engine.quant.weight import Weight

Block = tuple[int, int]
"""Rows and columns that share a scale."""

RUNS_AS = "int8:g32"
"""The scheme of FP8 weights under `--quant auto`."""

FLOAT8_NOTE = (
    f"FP8: they run as {RUNS_AS}, which is as small and adds 4 to 8 % to FP8's squared error; "
    "--quant none makes floats of them"
)

_SCALES = ("weight_scale", "weight_scale_inv")
_MODEL_OPT_BLOCK = (128, 128)
_MODEL_OPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")


@dataclass(frozen=True)
class Float8:
    """Modules stored as FP8.

    Attributes:
        left_out: Names of modules that are not quantized, or parts of them; "*" stands for anything.
        block: Rows and columns that share a scale; None: the whole matrix does, or each row has its own.
    """

    parts: ClassVar[tuple[str, ...]] = _SCALES
    unused: ClassVar[tuple[str, ...]] = ("input_scale", "activation_scale", "input_scale_ub")
    has_rows: ClassVar[bool] = False

    left_out: tuple[str, ...]
    block: Block | None

    def scheme(self, names: tuple[str, ...]) -> str:
        """See `engine.loading.formats.WeightFormat`."""
        return "none"

    def runs_as(self, names: tuple[str, ...]) -> str:
        """The scheme under `--quant auto`."""
        is_float = any(is_left_out(name, self.left_out) or _matches(name, self.left_out) for name in names)
        return "none" if is_float else RUNS_AS

    def read(self, module: StoredModule) -> Weight:
        """See `engine.loading.formats.WeightFormat`."""
        return read_float8(module, next(part for part in _SCALES if module.has(part)), self.block)


def open_float8(settings: Settings) -> Float8:
    """The format of "fp8" and "fbgemm_fp8" as config.json describes it.

    Raises:
        CheckpointError: A setting is not supported.
    """
    settings.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    left_out = (*settings.strings("modules_to_not_convert"), *settings.strings("ignored_layers"))
    return Float8(left_out, read_block(settings, "weight_block_size"))


def open_model_opt(settings: Settings) -> Float8:
    """The format of "modelopt" as config.json or hf_quant_config.json describes it.

    Raises:
        CheckpointError: An algorithm is not supported.
    """
    inner = settings.object("quantization") if "quantization" in settings.values else settings
    algorithm = inner.choice("quant_algo", _MODEL_OPT_ALGORITHMS)
    left_out = (*inner.strings("exclude_modules"), *inner.strings("ignore"))
    return Float8(left_out, _MODEL_OPT_BLOCK if algorithm == "FP8_PB_WO" else None)


def read_block(settings: Settings, key: str) -> Block | None:
    """Rows and columns of a block, a list of two; None where there is no such setting.

    Raises:
        CheckpointError: It is something else.
    """
    value = settings.values.get(key)
    if value is None:
        return None
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in value):
        raise settings.error(key, "two positive numbers")
    return value[0], value[1]


def read_float8(module: StoredModule, scale_part: str, block: Block | None) -> torch.Tensor:
    """The weight [N, K] float32 of codes in FP8.

    Args:
        scale_part: The part that holds the scales: one number, [N], [N, 1], or [ceil(N / block), ceil(K / block)].

    Raises:
        CheckpointError: A part is missing, damaged, or not what FP8 needs.
    """
    codes = module.read("weight", (torch.float8_e4m3fn,), (None, None))
    rows, columns = codes.shape
    if block is not None:
        shape = (-(-rows // block[0]), -(-columns // block[1]))
        scale = module.read(scale_part, FLOATS, shape).float()
        scale = scale.repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[
            :, :columns
        ]
        return codes.float() * scale
    scale = module.read(scale_part, FLOATS).float()
    if scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise module.error(
            scale_part, f"one number, or one for each of {rows} rows", f"shape {list(scale.shape)}"
        )
    return codes.float() * scale.reshape(-1, 1)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of ModelOpt's patterns is the name: "lm_head", "*.mlp.*"."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
