"""From a specification to schemes: which one each module of a model gets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.quant.codebook4 import Codebook4
from engine.quant.floating import Float
from engine.quant.int4 import Int4
from engine.quant.int8 import Int8
from engine.quant.int8_groups import Int8Groups
from engine.quant.int8_table import Int8Table
from engine.quant.int8_weight_only import Int8WeightOnly
from engine.quant.nf4 import NF4
from engine.quant.scheme import Scheme, TableScheme
from engine.quant_spec import EMBEDDING, QuantSpec, SchemeSpec


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

    def scheme(self, modules: Sequence[str]) -> Scheme:
        """That of modules which share one product.

        Raises:
            ConfigError: They do not agree.
        """
        return self._scheme(self.quant_spec.of_product(modules))

    @property
    def table(self) -> TableScheme:
        """That of the embedding."""
        is_float = self.quant_spec.of(EMBEDDING).kind == "none"
        return Float(self.dtype, self.batch_invariant) if is_float else Int8Table()

    @property
    def name(self) -> str:
        """Short, for file names: the specification if it is one word for all, else its digest."""
        text = str(self.quant_spec)
        if self.quant_spec.rules:
            text = "mixed-" + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return text.replace(":", "-")

    def _scheme(self, words: SchemeSpec) -> Scheme:
        match words.kind:
            case "int8" if words.is_weight_only:
                return Int8WeightOnly(words.group_size or None)
            case "int8" if words.group_size:
                return Int8Groups(words.group_size, words.activations)
            case "int8":
                return Int8(words.activations)
            case "int4":
                return Int4(words.group_size, self.batch_invariant)
            case "nf4":
                return NF4()
            case "codebook4":
                return Codebook4()
        return Float(self.dtype, self.batch_invariant)
