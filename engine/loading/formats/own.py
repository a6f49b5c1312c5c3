"""This engine's own layout, for grids that no published format holds: short last groups, float minimums.

For a module's weight [N, K] in groups of `group_size` along K, the last one perhaps shorter:

    codes      [N, ceil(K / 2)] uint8: element k in byte k // 2, the even ones in the low nibble
    scale      [N, ceil(K / group_size)] fp16
    minimum    like scale: w = code * scale + minimum

config.json: "quantization_config": {"quant_method": "llm-engine", "bits": 4, "group_size": 0 for whole rows}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.nibbles import unpack_nibbles
from engine.loading.formats.stored import Settings, StoredModule
from engine.quant.weight import GridWeight, Weight

QUANT_METHOD = "llm-engine"


@dataclass(frozen=True)
class OwnFormat:
    """Modules in this engine's layout.

    Attributes:
        group_size: 0 is whole rows.
    """

    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "minimum")
    unused: ClassVar[tuple[str, ...]] = ()

    group_size: int

    def read(self, module: StoredModule) -> Weight:
        """See `engine.loading.formats.WeightFormat`."""
        scale = module.read("scale", (torch.float16,), (None, None))
        minimum = module.read("minimum", (torch.float16,), tuple(scale.shape))
        packed = module.read("codes", (torch.uint8,), (scale.shape[0], None))
        codes = unpack_nibbles(packed)
        group_size = self.group_size or codes.shape[1]
        if -(-codes.shape[1] // group_size) != scale.shape[1]:
            expected = f"{-(-codes.shape[1] // group_size)} groups of {group_size}"
            raise module.error("scale", expected, str(scale.shape[1]))
        return GridWeight(codes, scale, minimum, group_size)


def open_own_format(settings: Settings) -> OwnFormat:
    """The format as config.json describes it.

    Raises:
        CheckpointError: A setting is not supported.
    """
    settings.choice("bits", (4,))
    group_size = settings.values.get("group_size")
    if type(group_size) is not int or group_size < 0:
        raise settings.error("group_size", "a positive number, or 0 for whole rows")
    return OwnFormat(group_size)
