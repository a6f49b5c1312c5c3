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
    sparse24:int8  codes   [N, K / 2] int8: two of each four along K, in their order; the others are zeros
                 masks     [N, ceil(K / 8)] uint8: four bits for each four, bit j set where its element j is a code's;
                           those of two fours, the first one's in the low nibble
                 scale     [N, 1] float32: w = code * scale
    sparse24:int4  codes   [N, K / 4] uint8: the two of a four, the first one in the low nibble
                 masks     likewise
                 scale     [N, ceil(K / g)] fp16: w = (code - 8) * scale
    int4:gN:rotated        as of int4, of W H in the place of W (`engine.kernels.rotation`)
    lowrank:int8  outer_codes, outer_scale    as of int8, of a factor [N, R]
                  inner_codes, inner_scale    of one [R, K]: w = outer @ inner. Of projections that are multiplied as
                           one matrix (q, k and v; gate and up) the first one alone has it, and they share it.
    lowrank:int4  likewise, as of int4
    lowrank:none  outer_weight and inner_weight, float
    none         weight    [N, K] float

`own_parts` makes the parts of a weight; what reads those of each kind is registered in `engine.quant.plan.SCHEMES`.

config.json: "quantization_config": {"quant_method": "llm-engine", "specification": "int4:g128,lm_head=none,..."}; the
specification is that of `engine.quant_spec` and says which of these each module is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from engine.errors import ConfigError
from engine.kernels.nibbles import pack_nibbles
from engine.loading.formats.stored import Settings, StoredModule
from engine.models.modules import first_of_product
from engine.quant.block_weight import BlockWeight
from engine.quant.lowrank import INNER, OUTER
from engine.quant.plan import SCHEMES
from engine.quant.sparse24 import sparse_parts
from engine.quant.weight import CodebookWeight, GridWeight, LowRankWeight, RotatedWeight, Weight
from engine.quant_spec import EMBEDDING, TABLE_GROUP_SIZE, QuantSpec, SchemeSpec, parse_quant_spec

QUANT_METHOD = "llm-engine"


@dataclass(frozen=True)
class OwnFormat:
    """Modules in this engine's layout.

    Attributes:
        specification: The scheme of each.
    """

    parts: ClassVar[tuple[str, ...]] = (
        "codes",
        "scale",
        "minimum",
        "codebook",
        "masks",
        *(prefix + part for prefix in (OUTER, INNER) for part in ("codes", "weight", "scale", "minimum")),
    )
    unused: ClassVar[tuple[str, ...]] = ()

    quant_spec: QuantSpec

    @property
    def has_rows(self) -> bool:
        """See `engine.loading.formats.WeightFormat`: an inner factor has none of the weight's."""
        return not self.quant_spec.has_low_rank

    def scheme(self, names: tuple[str, ...]) -> str:
        """See `engine.loading.formats.WeightFormat`."""
        return str(self.quant_spec.of(names[0]))

    def read(self, module: StoredModule) -> Weight:
        """See `engine.loading.formats.WeightFormat`."""
        words = self.quant_spec.of(module.name)
        read = SCHEMES[words.kind].read
        if read is not None:
            is_table = module.name == EMBEDDING and words.storage == "int8"
            first = StoredModule(module.source, first_of_product(module.name))

            def read_part(
                part: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
            ) -> torch.Tensor:
                return (first if part.startswith(INNER) else module).read(part, dtypes, shape)

            weight = read(read_part, TABLE_GROUP_SIZE if is_table else words.group_size)
            if not words.is_rotated:
                return weight
            assert isinstance(weight, GridWeight)
            return RotatedWeight(weight)
        part = next(part for part in self.parts if module.has(part))
        raise module.error(
            part, "a module that the specification of config.json does not leave as it is", "another"
        )


def own_parts(weight: Weight, words: SchemeSpec) -> dict[str, torch.Tensor]:
    """The parts of a module as they are stored; of a low-rank one with the inner factor.

    Args:
        words: The module's scheme.

    Raises:
        ConfigError: The scheme stores two of each four, and more are not zero.
    """
    if isinstance(weight, LowRankWeight):
        factors = ((OUTER, weight.outer), (INNER, weight.inner))
        return {
            prefix + part: tensor
            for prefix, factor in factors
            for part, tensor in own_parts(factor, words.dense).items()
        }
    if isinstance(weight, torch.Tensor):
        return {"weight": weight}
    assert not isinstance(weight, BlockWeight)
    if isinstance(weight, RotatedWeight):
        weight = weight.grid
    if isinstance(weight, CodebookWeight):
        packed = pack_nibbles(weight.codes)
        return {"codes": packed} | (
            {"codebook": weight.codebook} if weight.scale is None else {"scale": weight.scale}
        )
    if words.is_sparse:
        return sparse_parts(weight)
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
