"""A Hugging Face model directory as a Checkpoint: safetensors or pytorch_model.bin, sharded, quantized or neither."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from engine.errors import CheckpointError
from engine.loading.formats import auto_scheme, weight_format
from engine.loading.formats.float8 import FLOAT8_NOTE
from engine.loading.formats.stored import FLOATS, StoredModule
from engine.loading.json_file import read_json
from engine.loading.slices import check_shape, take_slices
from engine.loading.weight_files import Locations, locate_text_model, open_weight_file
from engine.parallel.shards import WHOLE, Slices
from engine.quant.weight import Weight
from engine.quant_spec import EMBEDDING, LM_HEAD, SchemeSpec, parse_scheme_spec

logger = logging.getLogger(__name__)

_TABLE, _HEAD = f"{EMBEDDING}.weight", f"{LM_HEAD}.weight"

# Published Gemma 3 files leave out what equals the defaults of transformers' Gemma3TextConfig.
_GEMMA3_TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3_ROPE_DEFAULTS = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}


class DirectoryCheckpoint:
    """The weights and configuration of a directory; see `engine.loading.checkpoint.Checkpoint`.

    Args:
        path: The directory, or one file of weights that its configuration lies beside.
    """

    def __init__(self, path: Path) -> None:
        self.path, directory = path, path if path.is_dir() else path.parent
        self.config = text_config(read_json(directory / "config.json", required=True))
        self.generation_config = read_json(directory / "generation_config.json")
        self.recommended_params = self.generation_config
        self._format = weight_format(directory, self.config)
        locations, self._others = locate_text_model(path)
        if self.config.get("tie_word_embeddings") and _TABLE not in locations and _HEAD in locations:
            locations[_TABLE] = locations.pop(_HEAD)
        self._stored = StoredTensors(path, locations)
        self.config.setdefault("tie_word_embeddings", _HEAD not in self.names())
        if self._format is not None:
            self._log_rounded()

    def names(self) -> set[str]:
        names = self._stored.names()
        if self._format is None:
            return names
        parts = tuple(f".{part}" for part in self._format.parts)
        unused = tuple(f".{part}" for part in self._format.unused)
        companions = {name for name in names if name.endswith((*parts, *unused))}
        weights = {
            name.removesuffix(part) + ".weight"
            for name in companions
            for part in parts
            if name.endswith(part)
        }
        return names - companions | weights

    def other_names(self) -> set[str]:
        return set(self._others)

    @property
    def num_bytes_read(self) -> int:
        return self._stored.num_bytes_read

    def tensor(self, name: str, part: Slices = WHOLE, shape: tuple[int, ...] | None = None) -> Weight:
        module = name.removesuffix(".weight")
        if self._format is not None and module != name:
            stored_part = self._quantized_part(StoredModule(self._stored, module))
            if stored_part is not None:
                return self._quantized(module, stored_part, part, shape)
        check_shape(self.path, name, self._stored.shape(name), shape)
        tensor = self._stored.read(name, part)
        if tensor.dtype not in FLOATS:
            file, stored_name = self._stored.locate(name)
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{file}: tensor {stored_name!r}: expected float32, float16 or bfloat16, found {kind}, and no "
                "settings of config.json say by which scales its numbers are to be multiplied"
            )
        return tensor

    def _quantized(
        self, module: str, stored_part: str, part: Slices, shape: tuple[int, ...] | None
    ) -> Weight:
        """A part of a quantized module's weight.

        Args:
            stored_part: One of those that are the module.
        """
        assert self._format is not None
        name = f"{module}.weight"
        if not self._format.has_rows or part.rows is None:
            weight = self._format.read(StoredModule(self._stored, module))
            check_shape(self.path, name, weight.shape, shape)
            return take_slices(weight, part, name)
        num_rows = self._stored.shape(f"{module}.{stored_part}")[0]
        weight = self._format.read(StoredModule(_Parts(self._stored, Slices(part.rows)), module))
        check_shape(self.path, name, (num_rows, weight.shape[1]), shape)
        return take_slices(weight, Slices(None, part.columns), name)

    def stored_scheme(self, module: str) -> str | None:
        """The specification of the scheme that keeps a module as it is stored, "int4:g128" for one.

        What `engine.loading.formats.stored_scheme` says where the files hold the module quantized; "none" where they
        hold floats, or a grid that no scheme keeps. None if nothing is quantized.

        Args:
            module: Like "model.layers.0.mlp.down_proj".
        """
        if self._format is None:
            return None
        stored = StoredModule(self._stored, module)
        part = self._quantized_part(stored)
        return "none" if part is None else self._format.scheme(stored.names(part))

    def auto_scheme(self, module: str) -> str | None:
        """As `stored_scheme`, but for FP8, which no scheme keeps: the one that it gets under `--quant auto`."""
        if self._format is None:
            return None
        stored = StoredModule(self._stored, module)
        part = self._quantized_part(stored)
        return "none" if part is None else auto_scheme(self._format, stored.names(part))

    def stored_schemes(self, modules: Iterable[str]) -> dict[str, SchemeSpec]:
        """The schemes of the modules that one keeps as they are stored."""
        return _quantized({module: self.stored_scheme(module) for module in modules})

    def auto_schemes(self, modules: Iterable[str]) -> dict[str, SchemeSpec]:
        """See `engine.loading.checkpoint.Checkpoint`."""
        return _quantized({module: self.auto_scheme(module) for module in modules})

    def _quantized_part(self, module: StoredModule) -> str | None:
        assert self._format is not None
        return next((part for part in self._format.parts if module.has(part)), None)

    def _log_rounded(self) -> None:
        """Says what becomes of quantized weights that no scheme keeps."""
        modules = [name.removesuffix(".weight") for name in self.names() if name.endswith(".weight")]
        quantized = {
            module: part
            for module in modules
            if (part := self._quantized_part(StoredModule(self._stored, module))) is not None
        }
        rounded = sorted(module for module in quantized if self.stored_scheme(module) == "none")
        floats = [module for module in rounded if self.auto_scheme(module) == "none"]
        for names, note in (
            (
                floats,
                "on grids that no scheme keeps: they are floats, unless --quant rounds them anew (int8:g32 adds "
                "least to their error)",
            ),
            ([module for module in rounded if module not in set(floats)], FLOAT8_NOTE),
        ):
            if names:
                logger.warning(
                    "%s: %d of %d quantized matrices, %s for one, are %s",
                    self.path,
                    len(names),
                    len(quantized),
                    names[0],
                    note,
                )


class StoredTensors:
    """A directory's tensors as they are stored; see `engine.loading.formats.stored.TensorSource`.

    Args:
        locations: (file, name in the file) of every tensor.

    Attributes:
        num_bytes_read: As `engine.loading.checkpoint.Checkpoint` has it.
    """

    def __init__(self, path: Path, locations: Locations) -> None:
        self._path, self._locations, self.num_bytes_read = path, locations, 0
        self._shards: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def names(self) -> set[str]:
        return set(self._locations)

    def locate(self, name: str) -> tuple[Path, str]:
        if name not in self._locations:
            raise CheckpointError(f"{self._path}: tensor {name!r} is missing")
        return self._locations[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header.

        Raises:
            CheckpointError: It is missing.
        """
        stored = self._open(name)
        return tuple(stored.shape if isinstance(stored, torch.Tensor) else stored.get_shape())

    def read(self, name: str, part: Slices = WHOLE) -> torch.Tensor:
        """See `engine.loading.formats.stored.TensorSource`; of a part only the part is read."""
        stored = self._open(name)
        index: tuple[slice, ...] = (slice(None) if part.rows is None else part.rows,)
        if part.columns is not None:
            index = (*index, part.columns)
        # Either one maps the file: what is not looked at is not read. A single number has no rows.
        tensor: torch.Tensor = stored[index if part != WHOLE else ...]
        self.num_bytes_read += tensor.nbytes
        return tensor

    def _open(self, name: str) -> Any:
        """A tensor that is mapped, or a slice of a safetensors file."""
        file, stored_name = self.locate(name)
        if file not in self._shards:
            self._shards[file] = open_weight_file(file)
        shard = self._shards[file]
        try:
            stored = shard[stored_name] if isinstance(shard, dict) else shard.get_slice(stored_name)
        except (KeyError, SafetensorError) as error:
            raise CheckpointError(f"{file}: tensor {stored_name!r} is missing") from error
        if isinstance(shard, dict) and not isinstance(stored, torch.Tensor):
            raise CheckpointError(f"{file}: {stored_name!r} is not a tensor")
        return stored


@dataclass(frozen=True, slots=True)
class _Parts:
    """The same part of each of a directory's tensors; see `engine.loading.formats.stored.TensorSource`."""

    stored: StoredTensors
    part: Slices

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def read(self, name: str) -> torch.Tensor:
        return self.stored.read(name, self.part)

    def locate(self, name: str) -> tuple[Path, str]:
        return self.stored.locate(name)


def _quantized(found: dict[str, str | None]) -> dict[str, SchemeSpec]:
    schemes = {module: parse_scheme_spec(text) for module, text in found.items() if text is not None}
    return {module: words for module, words in schemes.items() if words.kind != "none"}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's configuration, on one level and complete."""
    text = config.get("text_config")
    if text is not None:
        outer = {key: value for key, value in config.items() if not key.endswith("_config")}
        quantization: dict[str, Any] = {
            key: config[key] for key in ("quantization_config", "compression_config") if key in config
        }
        config = {**outer, **quantization, **text}
    if config.get("model_type") == "gemma3_text":
        rope_defaults = {} if "rope_parameters" in config else _GEMMA3_ROPE_DEFAULTS
        config = {**_GEMMA3_TEXT_DEFAULTS, **rope_defaults, **config}
    return config
