"""compressed-tensors, what llm-compressor writes: integer weights, packed in words or one a byte, and FP8.

"pack-quantized"                weight_packed [N, ceil(K bits / 32)] int32, along K from a word's lowest bits on
                                weight_shape [2]: N, K
                                weight_zero_point [ceil(N bits / 32), G] int32, packed along N
"int-quantized",                weight [N, K] int8
"naive-quantized"               weight_zero_point [N, G] int8
"float-quantized"               weight [N, K] FP8 (E4M3), weight_scale as below, or of blocks (`block_structure`)
the integer ones                weight_scale [N, G] float; [1] for a whole tensor, one column for whole rows
                                weight_g_idx [K] int32, the group of each column (`actorder`: "group")

Codes are signed, -2^(bits - 1) to 2^(bits - 1) - 1; packed ones, zeros too, are stored larger by 2^(bits - 1).
Quantized activations are the engine's own matter: their scales are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.loading.formats.float8 import RUNS_AS, Block, read_block, read_float8
from engine.loading.formats.stored import (
    FLOATS,
    Settings,
    StoredModule,
    grid_scheme,
    make_weight,
    packed_size,
    unpack_words,
)
from engine.quant.weight import Weight

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group of modules are stored.

    Attributes:
        strategy: What shares a scale: "tensor", "channel" (a row) or "group".
        group_size: With the strategy "group".
        is_ordered: Groups may be of columns that are not consecutive.
        is_float: FP8.
        block: Rows and columns that share a scale, with the strategy "block", which only FP8 has.
    """

    is_packed: bool
    bits: int
    is_symmetric: bool
    strategy: str
    group_size: int
    is_ordered: bool
    is_float: bool = False
    block: Block | None = None

    @property
    def offset(self) -> int:
        """What makes signed codes unsigned."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class CompressedTensors:
    """Modules stored by compressed-tensors.

    Attributes:
        schemes: Targets and the scheme of the modules that they match.
        ignore: Targets of modules that are not quantized.
    """

    parts: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
    )
    unused: ClassVar[tuple[str, ...]] = (
        "input_scale",
        "input_zero_point",
        "output_scale",
        "output_zero_point",
    )
    has_rows: ClassVar[bool] = False

    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]

    def scheme(self, names: tuple[str, ...]) -> str:
        """See `engine.loading.formats.WeightFormat`."""
        scheme = self._scheme_of(names)
        if scheme is None or scheme.is_ordered or scheme.is_float:
            return "none"
        return grid_scheme(scheme.bits, scheme.group_size, scheme.is_symmetric)

    def runs_as(self, names: tuple[str, ...]) -> str:
        """The scheme under `--quant auto`."""
        scheme = self._scheme_of(names)
        return RUNS_AS if scheme is not None and scheme.is_float else self.scheme(names)

    def read(self, module: StoredModule) -> Weight:
        """See `engine.loading.formats.WeightFormat`."""
        part = next(part for part in self.parts if module.has(part))
        scheme = self._scheme_of(module.names(part))
        if scheme is None:
            raise module.error(part, "a module that the config_groups of config.json target", "another")
        if scheme.is_float:
            return read_float8(module, "weight_scale", scheme.block)
        codes = _read_packed(module, scheme) if scheme.is_packed else _read_bytes(module, scheme)
        rows, columns = codes.shape
        group_size = scheme.group_size if scheme.strategy == "group" else columns
        num_groups = -(-columns // group_size)
        scale = _read_each(module, "weight_scale", FLOATS, scheme, rows, num_groups)
        zero = _read_zero(module, scheme, rows, num_groups)
        group_index = _read_group_index(module, columns, num_groups)
        return make_weight(codes, zero, scale, scheme.bits, group_size, group_index)

    def _scheme_of(self, names: tuple[str, ...]) -> Scheme | None:
        """The scheme of a module, by its names; None if it is not quantized."""
        matches = [
            (rank, scheme) for targets, scheme in self.schemes if (rank := _match(targets, names)) is not None
        ]
        if not matches or _match(self.ignore, names) is not None:
            return None
        return min(matches, key=lambda match: match[0])[1]


def open_compressed_tensors(settings: Settings) -> CompressedTensors:
    """The format as config.json describes it.

    Raises:
        CheckpointError: A setting is not supported.
    """
    settings.object("sparsity_config").choice("format", ("dense",), "dense")
    if settings.object("transform_config").values.get("config_groups"):
        raise settings.error("transform_config", "no transforms of activations")
    schemes = []
    groups = settings.object("config_groups")
    for name in groups.values:
        group = groups.object(name)
        weights = group.object("weights")
        # Some groups quantize activations only.
        if not weights.values:
            continue
        layout_settings = group if group.values.get("format") else settings
        layout = layout_settings.choice("format", _FORMATS)
        is_float = weights.values.get("type") == "float" and layout == "naive-quantized"
        if layout == "float-quantized" or is_float:
            schemes.append((_read_targets(group, "targets"), _open_float_scheme(weights)))
            continue
        schemes.append((_read_targets(group, "targets"), _open_scheme(weights, layout == "pack-quantized")))
    return CompressedTensors(tuple(schemes), _read_targets(settings, "ignore"))


def _open_scheme(weights: Settings, is_packed: bool) -> Scheme:
    weights.choice("type", ("int",), "int")
    bits = weights.choice("num_bits", (4, 8))
    strategy = weights.choice("strategy", ("tensor", "channel", "group"))
    group_size = weights.group_size() if strategy == "group" else -1
    if strategy == "group" and group_size == -1:
        raise weights.error("group_size", "a positive number")
    is_symmetric = weights.choice("symmetric", (True, False), True)
    is_ordered = strategy == "group" and weights.values.get("actorder") in ("group", "dynamic", True)
    return Scheme(is_packed, bits, is_symmetric, strategy, group_size, is_ordered)


def _open_float_scheme(weights: Settings) -> Scheme:
    weights.choice("type", ("float",))
    weights.choice("num_bits", (8,))
    strategy = weights.choice("strategy", ("tensor", "channel", "block"))
    block = read_block(weights, "block_structure") if strategy == "block" else None
    if strategy == "block" and block is None:
        raise weights.error("block_structure", "two positive numbers")
    return Scheme(False, 8, True, strategy, -1, is_ordered=False, is_float=True, block=block)


def _read_targets(settings: Settings, key: str) -> tuple[str, ...]:
    """Names and classes of modules, and patterns of names behind "re:"."""
    targets = settings.strings(key)
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise settings.error(key, f"regular expressions behind re: ({error})") from error
    return targets


def _match(targets: Iterable[str], names: tuple[str, ...]) -> int | None:
    """How loosely the targets match a module, None if not at all: 0 by name, 1 by a pattern, 2 by class."""
    module_class = "Embedding" if names[0].endswith("embed_tokens") else "Linear"
    ranks = []
    for target in targets:
        if target in names:
            ranks.append(0)
        elif target.startswith("re:"):
            pattern = target.removeprefix("re:")
            ranks += [1 for name in names if re.match(pattern, name)]
        elif target == module_class:
            ranks.append(2)
    return min(ranks, default=None)


def _read_packed(module: StoredModule, scheme: Scheme) -> torch.Tensor:
    """Unsigned codes [N, K] uint8."""
    shape = module.read("weight_shape", (torch.int32, torch.int64), (2,)).tolist()
    rows, columns = shape
    if rows < 1 or columns < 1:
        raise module.error("weight_shape", "two sizes", str(shape))
    words = module.read("weight_packed", (torch.int32,), (rows, packed_size(columns, scheme.bits)))
    return unpack_words(words, scheme.bits)[:, :columns]


def _read_bytes(module: StoredModule, scheme: Scheme) -> torch.Tensor:
    """Unsigned codes [N, K] uint8."""
    codes = module.read("weight", (torch.int8,), (None, None))
    lowest, highest = int(codes.min()), int(codes.max())
    if lowest < -scheme.offset or highest >= scheme.offset:
        expected = f"codes of {-scheme.offset} to {scheme.offset - 1}"
        raise module.error("weight", expected, f"{lowest} to {highest}")
    return codes.view(torch.uint8) + scheme.offset


def _read_zero(module: StoredModule, scheme: Scheme, rows: int, num_groups: int) -> torch.Tensor:
    """The unsigned codes of zero, [N, G] int32."""
    part = "weight_zero_point"
    if scheme.is_symmetric and not module.has(part):
        return torch.full((rows, num_groups), scheme.offset, dtype=torch.int32)
    # Before 0.10 compressed-tensors packed the codes only.
    if module.read(part, (torch.int8, torch.int32)).dtype == torch.int8:
        return _read_each(module, part, (torch.int8,), scheme, rows, num_groups).int() + scheme.offset
    words = module.read(part, (torch.int32,), (packed_size(rows, scheme.bits), num_groups))
    return unpack_words(words.t(), scheme.bits)[:, :rows].t().int()


def _read_each(
    module: StoredModule,
    part: str,
    dtypes: tuple[torch.dtype, ...],
    scheme: Scheme,
    rows: int,
    num_groups: int,
) -> torch.Tensor:
    """A number for each group, [N, G]; one for a whole tensor is repeated."""
    if scheme.strategy != "tensor":
        return module.read(part, dtypes, (rows, num_groups))
    tensor = module.read(part, dtypes)
    if tensor.numel() != 1:
        raise module.error(part, "one number", f"shape {list(tensor.shape)}")
    return tensor.reshape(1, 1).repeat(rows, 1)


def _read_group_index(module: StoredModule, columns: int, num_groups: int) -> torch.Tensor | None:
    part = "weight_g_idx"
    if not module.has(part):
        return None
    # An index that was never set is -1 throughout.
    if torch.all(module.read(part) == -1):
        return None
    return module.read_group_index(part, columns, num_groups)
