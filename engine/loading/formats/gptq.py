"""GPTQ as AutoGPTQ and GPTQModel store it (https://arxiv.org/abs/2210.17323): words packed along K.

qweight [K * bits / 32, N] int32     element k of a column in word k * bits // 32, from its lowest bits on
qzeros  [G, N * bits / 32] int32     packed along N in the same way; "gptq" stores zero - 1, "gptq_v2" zero
scales  [G, N]                       float
g_idx   [K] int32                    the group of each column; columns in the order of activations' sizes
                                     (`desc_act`) have groups that are not consecutive

Groups that are not consecutive need the order of the columns beside the codes, and activations in that order,
another one for every product: no scheme has that, so these weights become floats. Rounding them anew adds to the
squared error that they have already (columns of Student's t with sizes of their own, groups of 128 by size): 159 %
as int4:g128, 67 % as int4:g32, 4 % as int8, 0.4 % as int8:g32.
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
    grid_scheme,
    is_left_out,
    make_weight,
    packed_size,
    unpack_words,
)
from engine.quant.weight import Weight
from engine.quant_spec import EMBEDDING, LM_HEAD

_BITS = (4, 8)
_FLOAT_BITS = 16
_AUTO_ROUND_PACKINGS = ("auto_round:auto_gptq", "auto_round:gptq", "auto_gptq", "gptq")

# A one in each element of a word.
_ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class Numbers:
    """A module's grid.

    Attributes:
        group_size: -1 for whole rows.
        is_ordered: Groups may be of columns that are not consecutive.
    """

    bits: int
    group_size: int
    is_symmetric: bool
    is_ordered: bool


@dataclass(frozen=True)
class GPTQ:
    """Modules stored with GPTQ.

    Attributes:
        subtracts_one: Stored zeros are smaller by one.
        exceptions: Numbers of the modules whose names begin with a pattern's match, None if they are not quantized;
            the first one counts.
        left_out: Names of modules that are not quantized, or parts of them.
        quantized: Ends of names of a layer's quantized modules; empty for all of them.
        has_head: Whether the vocabulary projection is quantized.
    """

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    unused: ClassVar[tuple[str, ...]] = ()
    has_rows: ClassVar[bool] = False

    numbers: Numbers
    subtracts_one: bool
    exceptions: tuple[tuple[re.Pattern[str], Numbers | None], ...]
    left_out: tuple[str, ...]
    quantized: tuple[str, ...]
    has_head: bool

    def scheme(self, names: tuple[str, ...]) -> str:
        """See `engine.loading.formats.WeightFormat`."""
        numbers = self._numbers_of(names)
        module = names[0]
        is_float = (
            numbers is None
            or module == EMBEDDING
            or (module == LM_HEAD and not self.has_head)
            or (module != LM_HEAD and bool(self.quantized) and not module.endswith(self.quantized))
            or any(is_left_out(name, self.left_out) for name in names)
        )
        if numbers is None or is_float or (numbers.is_ordered and numbers.group_size != -1):
            return "none"
        return grid_scheme(numbers.bits, numbers.group_size, numbers.is_symmetric)

    def read(self, module: StoredModule) -> Weight:
        """See `engine.loading.formats.WeightFormat`."""
        numbers = self._numbers_of(module.names("qweight"))
        if numbers is None:
            raise module.error(
                "qweight", 'a module that no "-:" pattern of dynamic names', "one that it does"
            )
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

    def _numbers_of(self, names: tuple[str, ...]) -> Numbers | None:
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
    numbers = _read_numbers(settings, None)
    exceptions: list[tuple[re.Pattern[str], Numbers | None]] = []
    dynamic = settings.object("dynamic")
    for key in dynamic.values:
        changed = dynamic.object(key)
        try:
            pattern = re.compile(key.removeprefix("+:").removeprefix("-:"))
        except re.error as error:
            raise dynamic.error(key, f"a regular expression as the key ({error})") from error
        exceptions.append((pattern, None if key.startswith("-:") else _read_numbers(changed, numbers)))
    return GPTQ(
        numbers,
        layout == "gptq",
        tuple(exceptions),
        settings.strings("modules_to_not_convert"),
        _read_quantized(settings),
        settings.choice("lm_head", (True, False), False),
    )


def open_auto_round(settings: Settings) -> GPTQ:
    """The format of AutoRound (https://arxiv.org/abs/2309.05516) where it packs as AutoGPTQ does.

    Raises:
        CheckpointError: It packs in another way, or a setting is not supported.
    """
    settings.choice("packing_format", _AUTO_ROUND_PACKINGS)
    numbers = _read_numbers(settings, None)
    exceptions: list[tuple[re.Pattern[str], Numbers | None]] = []
    changed = settings.object("extra_config")
    for name in changed.values:
        module = changed.object(name)
        bits = module.values.get("bits")
        is_float = type(bits) is int and bits >= _FLOAT_BITS
        exceptions.append(
            (re.compile(re.escape(name) + "$"), None if is_float else _read_numbers(module, numbers))
        )
    has_head = any(pattern.match(LM_HEAD) and one is not None for pattern, one in exceptions)
    return GPTQ(numbers, True, tuple(exceptions), (), (), has_head)


def _read_numbers(settings: Settings, default: Numbers | None) -> Numbers:
    """A grid; what is not said is as in `default`, or as GPTQModel has it."""
    flags = (True, False)
    is_ordered = settings.choice("desc_act", flags, default.is_ordered if default else False)
    return Numbers(
        settings.choice("bits", _BITS, default.bits if default else None),
        settings.group_size(default.group_size if default else None),
        settings.choice("sym", flags, default.is_symmetric if default else True),
        # Static groups are those of the columns' own order.
        is_ordered and not settings.choice("static_groups", flags, False),
    )


def _read_quantized(settings: Settings) -> tuple[str, ...]:
    """`modules_in_block_to_quantize`: a list of lists of modules that were quantized one after the other."""
    key = "modules_in_block_to_quantize"
    value = settings.values.get(key)
    value = [] if value is None else value
    if isinstance(value, list):
        names = [name for item in value for name in (item if isinstance(item, list) else [item])]
        if all(isinstance(name, str) for name in names):
            return tuple(f".{name}" for name in names)
    raise settings.error(key, "lists of strings")
