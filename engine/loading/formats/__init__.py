"""Quantized weights in Hugging Face directories: one module for each `quant_method` of config.json.

A format names the stored tensors that together are a module's weight, and makes a `Weight` of them: the file's own
grid where `GridWeight` can hold it, floats otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from engine.errors import CheckpointError
from engine.loading.formats.awq import open_awq
from engine.loading.formats.bitsandbytes import open_bitsandbytes
from engine.loading.formats.compressed_tensors import CompressedTensors, open_compressed_tensors
from engine.loading.formats.float8 import Float8, open_float8, open_model_opt
from engine.loading.formats.gptq import open_auto_round, open_gptq
from engine.loading.formats.own import QUANT_METHOD, open_own_format
from engine.loading.formats.stored import Settings, StoredModule
from engine.loading.json_file import read_json
from engine.quant.weight import Weight


class WeightFormat(Protocol):
    """How the weights of quantized modules are stored.

    Attributes:
        parts: What follows a module's name in those of the tensors that are its weight; a module that has one of
            them is quantized.
        unused: The same for tensors that are not read, such as scales of activations.
        has_rows: Whether all parts have the weight's rows: then rows are read without the others.
    """

    parts: ClassVar[tuple[str, ...]]
    unused: ClassVar[tuple[str, ...]]

    @property
    def has_rows(self) -> bool: ...

    def scheme(self, names: tuple[str, ...]) -> str:
        """The specification of the scheme that keeps a module as it is stored, "int4:g128" for one.

        "none" if config.json says that the module is not quantized, or if no scheme keeps its grid.

        Args:
            names: The module's own name, like "model.layers.0.mlp.down_proj", and those which config.json may call
                it by, if it has others.
        """
        ...

    def read(self, module: StoredModule) -> Weight:
        """The weight [N, K] of a quantized module.

        Raises:
            CheckpointError: A tensor is missing, damaged, or not what the configuration says.
        """
        ...


_FORMATS: dict[str, Callable[[Settings], WeightFormat]] = {
    "auto-round": open_auto_round,
    "awq": open_awq,
    "bitsandbytes": open_bitsandbytes,
    "compressed-tensors": open_compressed_tensors,
    "fbgemm_fp8": open_float8,
    "fp8": open_float8,
    "gptq": open_gptq,
    "modelopt": open_model_opt,
    QUANT_METHOD: open_own_format,
}

# ModelOpt's own file; its later releases say the same in config.json.
_MODEL_OPT_FILE = "hf_quant_config.json"

# The second is what compressed-tensors' first releases wrote.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def weight_format(path: Path, config: dict[str, Any]) -> WeightFormat | None:
    """The format of a directory's quantized weights; None if there are none.

    Args:
        path: The directory.
        config: The keys of config.json.

    Raises:
        CheckpointError: The method, or a setting of it, is not supported.
    """
    file = path / "config.json"
    key = next((key for key in QUANTIZATION_KEYS if config.get(key)), None)
    if key is None:
        separate = read_json(path / _MODEL_OPT_FILE)
        return open_model_opt(Settings(path / _MODEL_OPT_FILE, "$", separate)) if separate else None
    if not isinstance(config[key], dict):
        raise CheckpointError(f"{file}: {key}: expected an object, found {config[key]!r}")
    settings = Settings(file, key, config[key])
    method = settings.values.get("quant_method")
    if method is None and (settings.values.get("load_in_4bit") or settings.values.get("load_in_8bit")):
        # transformers < 4.31 named no method: there was one.
        method = "bitsandbytes"
    if method is None and settings.values.get("quant_algo"):
        method = "modelopt"
    if not isinstance(method, str) or method not in _FORMATS:
        supported = ", ".join(_FORMATS)
        raise CheckpointError(f"{file}: weights quantized with {method!r} are not supported; {supported} are")
    return _FORMATS[method](settings)


def auto_scheme(format: WeightFormat, names: tuple[str, ...]) -> str:
    """The specification of the scheme that a quantized module gets under `--quant auto`: the one that keeps it, or,
    of numbers that none keeps, one that adds little to their error.

    Args:
        names: As `WeightFormat.scheme` has them.
    """
    if isinstance(format, Float8 | CompressedTensors):
        return format.runs_as(names)
    return format.scheme(names)


def stored_scheme(config: dict[str, Any], module: str) -> str | None:
    """A module's scheme under `--quant auto`, as config.json has it: its specification, None without quantization.

    Args:
        config: The keys of config.json.
        module: Like "model.layers.0.mlp.down_proj".

    Raises:
        CheckpointError: As `weight_format`.
    """
    found = weight_format(Path(), config)
    return None if found is None else auto_scheme(found, (module,))
