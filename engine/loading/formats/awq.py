"""AWQ as AutoAWQ's "gemm" version stores it (https://arxiv.org/abs/2306.00978): words packed along N.

qweight [K, N / 8] int32     from a word's lowest bits on, columns 0, 2, 4, 6, 1, 3, 5, 7 of eight
qzeros  [G, N / 8] int32     packed in the same way
scales  [G, N]               float
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.loading.formats.stored import (
    FLOATS,
    Settings,
    StoredModule,
    grid_scheme,
    is_left_out,
    make_weight,
    packed_size,
    unpack_words,
)
from engine.quant.weight import Weight
from engine.quant_spec import ENDS

_BITS = 4

# Where each of a word's columns is, counted from its lowest bits.
_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AWQ:
    """Modules stored with AWQ.

    Attributes:
        group_size: -1 for whole rows.
        left_out: Names of modules that are not quantized, or parts of them.
    """

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    unused: ClassVar[tuple[str, ...]] = ()
    has_rows: ClassVar[bool] = False

    group_size: int
    left_out: tuple[str, ...]

    def scheme(self, names: tuple[str, ...]) -> str:
        """See `engine.loading.formats.WeightFormat`."""
        if names[0] in ENDS or any(is_left_out(name, self.left_out) for name in names):
            return "none"
        return grid_scheme(_BITS, self.group_size, is_symmetric=False)

    def read(self, module: StoredModule) -> Weight:
        """See `engine.loading.formats.WeightFormat`."""
        words = module.read("qweight", (torch.int32,), (None, None))
        in_features, out_features = words.shape[0], words.shape[1] * 8
        group_size = in_features if self.group_size == -1 else self.group_size
        num_groups = -(-in_features // group_size)
        scale = module.read("scales", FLOATS, (num_groups, out_features))
        zero_words = module.read("qzeros", (torch.int32,), (num_groups, packed_size(out_features, _BITS)))
        return make_weight(
            codes=_unpack(words).t().contiguous(),
            zero=_unpack(zero_words).t().int(),
            scale=scale.t().contiguous(),
            bits=_BITS,
            group_size=group_size,
        )


def open_awq(settings: Settings) -> AWQ:
    """The format as config.json describes it.

    Raises:
        CheckpointError: A setting is not supported.
    """
    for key in ("version", "format", "checkpoint_format"):
        settings.choice(key, ("gemm", "GEMM"), "gemm")
    if settings.values.get("backend") == "llm-awq":
        raise settings.error("backend", "AutoAWQ's layout")
    settings.choice("bits", (_BITS,))
    return AWQ(settings.group_size(), settings.strings("modules_to_not_convert"))


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """[R, W] int32 → [R, 8 W] uint8, in the order of columns."""
    rows, columns = words.shape
    return unpack_words(words, _BITS).view(rows, columns, 8)[:, :, _POSITIONS].flatten(1)
