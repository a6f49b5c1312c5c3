"""From a specification to schemes: which one each module of a model gets, and what each kind of scheme can do.

What may be said of a kind of scheme stands in `engine.quant_spec.KINDS`; here stands what is done then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.kernels.matmul.codebook import SCALE_SIZE
from engine.quant.block_weight import BLOCK_TYPES
from engine.quant.blocks import Blocks
from engine.quant.codebook import cluster_rows, round_to_nf4
from engine.quant.codebook4 import Codebook4, read_codebook4
from engine.quant.floating import Float
from engine.quant.int4 import Int4, read_int4
from engine.quant.int8 import Int8, read_int8
from engine.quant.int8_groups import Int8Groups
from engine.quant.int8_weight_only import Int8WeightOnly
from engine.quant.lowrank import LowRank, ReadFactor, read_floats, read_low_rank
from engine.quant.nf4 import NF4, read_nf4
from engine.quant.parts import ReadPart
from engine.quant.rotated import Rotated
from engine.quant.scheme import Scheme
from engine.quant.sparse24 import Sparse24Int4, Sparse24Int8, read_sparse24_int4, read_sparse24_int8
from engine.quant.weight import CodebookWeight, GridWeight, Weight
from engine.quant_spec import EMBEDDING, LM_HEAD, TABLE_GROUP_SIZE, QuantSpec, SchemeSpec


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """The schemes of a model's modules.

    Attributes:
        dtype: Of weights that are floats.
        batch_invariant: Float products in one form for any number of tokens (`--deterministic`).
    """

    quant_spec: QuantSpec
    dtype: torch.dtype
    batch_invariant: bool = False

    def schemes(self, modules: Sequence[str]) -> list[Scheme]:
        """The scheme of each of some modules which share one product.

        Raises:
            ConfigError: Their products cannot be one.
        """
        return [SCHEMES[words.kind].make(words, self) for words in self.quant_spec.of_product(modules)]

    @property
    def head(self) -> Scheme:
        """The scheme of the vocabulary projection."""
        return self.schemes([LM_HEAD])[0]

    @property
    def table(self) -> Scheme:
        """The scheme of the embedding; where it is the head's, and they are tied, they are stored once."""
        table = self.quant_spec.of(EMBEDDING)
        if table == SchemeSpec("int8"):
            return Int8Groups(TABLE_GROUP_SIZE)
        return self.schemes([EMBEDDING])[0]

    @property
    def name(self) -> str:
        """Short, for file names: the specification if it is one word for all, else its digest."""
        text = str(self.quant_spec)
        if self.quant_spec.rules:
            text = "mixed-" + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return text.replace(":", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredScheme:
    """What is done with one kind of scheme.

    Attributes:
        make: The scheme of a module, from what is said of it and the plan of the model.
        read: Reads a weight of this engine's own checkpoints, in groups of so many along K (0: what the kind has);
            None: it is stored as floats.
        round: Rounds a weight [N, K], given how much each column matters, [K], or None if all do alike. None: its
            values are evenly spaced, and the steps of a recipe (`engine.compression.recipe`) find them.
        weighs_columns: Whether `round` asks how much columns matter, which calibration tells.
        scale_group: Elements along K that share a scale, where that cannot be said; 0: whole rows, or what is said.
        has_zero: Whether a weight of zero, whatever stands beside it, can be stored as exactly that.
    """

    make: Callable[[SchemeSpec, QuantizationPlan], Scheme]
    read: Callable[[ReadPart, int], Weight] | None = None
    round: Callable[[torch.Tensor, torch.Tensor | None], GridWeight | CodebookWeight] | None = None
    weighs_columns: bool = False
    scale_group: int = 0
    has_zero: bool = True


def _make_int8(words: SchemeSpec, plan: QuantizationPlan) -> Scheme:
    if words.is_weight_only:
        return Int8WeightOnly(words.group_size or None)
    if words.group_size:
        return Int8Groups(words.group_size, words.activations)
    return Int8(words.activations)


def _make_int4(words: SchemeSpec, plan: QuantizationPlan) -> Scheme:
    scheme = Int4(words.group_size, plan.batch_invariant)
    return Rotated(scheme) if words.is_rotated else scheme


def _low_rank(read_factor: ReadFactor) -> RegisteredScheme:
    """Two factors, each stored as its dense kind is."""

    def make(words: SchemeSpec, plan: QuantizationPlan) -> Scheme:
        factors = SCHEMES[words.dense.kind].make(words.dense, plan)
        return LowRank(factors, words.rank)

    return RegisteredScheme(make=make, read=lambda read, size: read_low_rank(read, size, read_factor))


SCHEMES: dict[str, RegisteredScheme] = {
    "none": RegisteredScheme(make=lambda words, plan: Float(plan.dtype, plan.batch_invariant)),
    "int8": RegisteredScheme(make=_make_int8, read=read_int8),
    "int4": RegisteredScheme(make=_make_int4, read=read_int4),
    "nf4": RegisteredScheme(
        make=lambda words, plan: NF4(),
        read=read_nf4,
        round=lambda weight, importance: round_to_nf4(weight),
        scale_group=SCALE_SIZE,
    ),
    "codebook4": RegisteredScheme(
        make=lambda words, plan: Codebook4(),
        read=read_codebook4,
        round=cluster_rows,
        weighs_columns=True,
        has_zero=False,
    ),
    "sparse24:int8": RegisteredScheme(make=lambda words, plan: Sparse24Int8(), read=read_sparse24_int8),
    "sparse24:int4": RegisteredScheme(
        make=lambda words, plan: Sparse24Int4(words.group_size, plan.batch_invariant),
        read=read_sparse24_int4,
    ),
    "lowrank:none": _low_rank(read_floats),
    "lowrank:int8": _low_rank(read_int8),
    "lowrank:int4": _low_rank(read_int4),
    **{kind: RegisteredScheme(make=lambda words, plan: Blocks(words.kind)) for kind in BLOCK_TYPES},
}
"""By the kinds of `engine.quant_spec.KINDS`."""
