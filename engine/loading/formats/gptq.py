"""GPTQ as AutoGPTQ and GPTQModel store it (https://arxiv.org/abs/2210.17323): words packed along K.

qweight [K * bits / 32, N] int32     element k of a column in word k * bits // 32, from its lowest bits on
qzeros  [G, N * bits / 32] int32     packed along N in the same way; "gptq" stores zero - 1, "gptq_v2" zero
scales  [G, N]                       float
g_idx   [K] int32                    the group of each column; columns in the order of activations' sizes
                                     (`desc_act`) have groups that are not consecutive
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.loading.formats.stored import (
    FLOATS,
    Settings,
    StoredModule,
    make_weight,
    packed_size,
    unpack_words,
)
from engine.quant.weight import Weight

_BITS = (4, 8)

# A one in each element of a word.
_ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class Numbers:
    """The bits of a module's codes, and the size of its groups (-1: whole rows)."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class GPTQ:
    """Modules stored with GPTQ.

    Attributes:
        subtracts_one: Stored zeros are smaller by one.
        exceptions: Numbers of the modules whose names begin with a pattern's match; the first one counts.
    """

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    unused: ClassVar[tuple[str, ...]] = ()

    numbers: Numbers
    subtracts_one: bool
    exceptions: tuple[tuple[re.Pattern[str], Numbers], ...]

    def read(self, module: StoredModule) -> Weight:
        """See `engine.loading.formats.WeightFormat`."""
        numbers = self._numbers_of(module)
        bits = numbers.bits
        words = module.read("qweight", (torch.int32,), (None, None))
        in_features, out_features = words.shape[0] * 32 // bits, words.shape[1]
        group_size = in_features if numbers.group_size == -1 else numbers.group_size
        num_groups = -(-in_features // group_size)
        scale = module.read("scales", FLOATS, (num_groups, out_features))
        zero_words = module.read("qzeros", (torch.int32,), (num_groups, packed_size(out_features, bits)))
        if self.subtracts_one:
            # Words at once: GPTQModel subtracts from words too, and a zero of 0 borrows from its neighbour.
            zero_words = (zero_words.long() + _ONES[bits]).to(torch.int32)
        group_index = None
        if module.has("g_idx"):
            group_index = module.read_group_index("g_idx", in_features, num_groups)
        codes = unpack_words(words.t(), bits)
        zero = unpack_words(zero_words, bits)[:, :out_features].t().int()
        return make_weight(codes, zero, scale.t().contiguous(), bits, group_size, group_index)

    def _numbers_of(self, module: StoredModule) -> Numbers:
        names = module.names("qweight")
        for pattern, numbers in self.exceptions:
            if any(pattern.match(name) for name in names):
                return numbers
        return self.numbers


def open_gptq(settings: Settings) -> GPTQ:
    """The format as config.json describes it.

    Raises:
        CheckpointError: A setting is not supported.
    """
    layout_key = "checkpoint_format" if settings.values.get("checkpoint_format") else "format"
    layout = settings.choice(layout_key, ("gptq", "gptq_v2"), "gptq")
    settings.choice("is_marlin_format", (False,), False)
    numbers = Numbers(settings.choice("bits", _BITS), settings.group_size())
    exceptions = []
    dynamic = settings.object("dynamic")
    for key in dynamic.values:
        # What "-:" names is not quantized.
        if key.startswith("-:"):
            continue
        changed = dynamic.object(key)
        try:
            pattern = re.compile(key.removeprefix("+:"))
        except re.error as error:
            raise dynamic.error(key, f"a regular expression as the key ({error})") from error
        exceptions.append(
            (
                pattern,
                Numbers(changed.choice("bits", _BITS, numbers.bits), changed.group_size(numbers.group_size)),
            )
        )
    return GPTQ(numbers, layout == "gptq", tuple(exceptions))
