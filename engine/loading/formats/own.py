"""This engine's own layout, for what no published format holds: short last groups, float minimums, codebooks.

For a weight [N, K] in groups of g along K, the last one perhaps shorter (K even where codes are of four bits):

    int4         codes     [N, K / 2] uint8: element k in byte k // 2, the even ones in the low nibble
                 scale     [N, ceil(K / g)] fp16
                 minimum   like scale: w = code * scale + minimum
    int8         codes     [N, K] int8
                 scale     [N, 1] float32, or [N, ceil(K / g)] fp16: w = code * scale. The embedding has groups of 32.
    nf4          codes     as of int4
                 scale     [N, ceil(K / 64)] float32: w = NF4[code] * scale
    codebook4    codes     as of int4
                 codebook  [N, 16] fp16: w = codebook[n, code]
    none         weight    [N, K] float

config.json: "quantization_config": {"quant_method": "llm-engine", "specification": "int4:g128,lm_head=none,..."}; the
specification is that of `engine.quant_spec` and says which of these each module is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from engine.errors import ConfigError
from engine.kernels.nibbles import pack_nibbles, unpack_nibbles
from engine.loading.formats.stored import Settings, StoredModule
from engine.quant.codebook import SIZE, nf4_values
from engine.quant.weight import CodebookWeight, GridWeight, Weight
from engine.quant_spec import EMBEDDING, QuantSpec, parse_quant_spec

QUANT_METHOD = "llm-engine"
TABLE_GROUP_SIZE = 32
"""Of an int8 embedding: what `engine.quant.int8_table` keeps."""

NF4_GROUP_SIZE = 64


@dataclass(frozen=True)
class OwnFormat:
    """Modules in this engine's layout.

    Attributes:
        specification: The scheme of each.
    """

    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "minimum", "codebook")
    unused: ClassVar[tuple[str, ...]] = ()
    has_rows: ClassVar[bool] = True

    quant_spec: QuantSpec

    def scheme(self, names: tuple[str, ...]) -> str:
        """See `engine.loading.formats.WeightFormat`."""
        return str(self.quant_spec.of(names[0]))

    def read(self, module: StoredModule) -> Weight:
        """See `engine.loading.formats.WeightFormat`."""
        words = self.quant_spec.of(module.name)
        match words.kind:
            case "int4":
                return _read_int4(module, words.group_size)
            case "int8":
                table_size = TABLE_GROUP_SIZE if module.name == EMBEDDING else 0
                return _read_int8(module, words.group_size or table_size)
            case "nf4":
                codes = unpack_nibbles(module.read("codes", (torch.uint8,), (None, None)))
                scale = _read_groups(module, "scale", torch.float32, codes, NF4_GROUP_SIZE)
                return CodebookWeight(codes, nf4_values()[None], scale, NF4_GROUP_SIZE)
            case "codebook4":
                codes = unpack_nibbles(module.read("codes", (torch.uint8,), (None, None)))
                codebook = module.read("codebook", (torch.float16,), (codes.shape[0], SIZE))
                return CodebookWeight(codes, codebook, None, codes.shape[1])
        part = next(part for part in self.parts if module.has(part))
        raise module.error(
            part, "a module that the specification of config.json does not leave as it is", "another"
        )


def own_parts(weight: GridWeight | CodebookWeight) -> dict[str, torch.Tensor]:
    """The parts of a module as they are stored."""
    if isinstance(weight, CodebookWeight):
        packed = pack_nibbles(weight.codes)
        return {"codes": packed} | (
            {"codebook": weight.codebook} if weight.scale is None else {"scale": weight.scale}
        )
    if weight.minimum is None:
        return {"codes": weight.codes, "scale": weight.scale}
    return {"codes": pack_nibbles(weight.codes), "scale": weight.scale, "minimum": weight.minimum}


def own_config(quant_spec: QuantSpec) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {"quant_method": QUANT_METHOD, "specification": str(quant_spec)}


def open_own_format(settings: Settings) -> OwnFormat:
    """The format as config.json describes it.

    Raises:
        CheckpointError: The specification is missing or none.
    """
    text = settings.values.get("specification")
    try:
        return OwnFormat(parse_quant_spec(str(text)))
    except ConfigError as error:
        raise settings.error("specification", f"one that --quant would take ({error})") from error


def _read_int4(module: StoredModule, group_size: int) -> GridWeight:
    codes = unpack_nibbles(module.read("codes", (torch.uint8,), (None, None)))
    size = group_size or codes.shape[1]
    scale, minimum = (_read_groups(module, part, torch.float16, codes, size) for part in ("scale", "minimum"))
    return GridWeight(codes, scale, minimum, size)


def _read_int8(module: StoredModule, group_size: int) -> GridWeight:
    codes = module.read("codes", (torch.int8,), (None, None))
    size = group_size or codes.shape[1]
    dtype = torch.float16 if group_size else torch.float32
    return GridWeight(codes, _read_groups(module, "scale", dtype, codes, size), None, size)


def _read_groups(
    module: StoredModule, part: str, dtype: torch.dtype, codes: torch.Tensor, group_size: int
) -> torch.Tensor:
    """A number for each group of the codes' columns."""
    return module.read(part, (dtype,), (codes.shape[0], -(-codes.shape[1] // group_size)))
