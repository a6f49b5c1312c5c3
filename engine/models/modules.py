"""The projections of a decoder layer: one table for all who name them.

Who builds, loads, dummies, splits, plans, calibrates, quantizes or rotates a layer goes through this table, so that
a new projection is a row of it. What is done with its outputs is written where the layer computes
(`engine.models.attention`, `engine.models.mlp`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from engine.models.config import ModelConfig
from engine.quant_spec import EMBEDDING, LM_HEAD

Width = Callable[[ModelConfig], int]
Block = Literal["attention", "MLP"]


@dataclass(frozen=True, slots=True)
class Projection:
    """One weight matrix of a layer.

    Attributes:
        name: Within the layer, as Hugging Face has it.
        gguf: The same as GGUF has it.
        out_features: N.
    """

    name: str
    gguf: str
    out_features: Width

    @property
    def short(self) -> str:
        """ "q" of "self_attn.q_proj"."""
        return self.name.rpartition(".")[2].removesuffix("_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Projections that share their inputs and are multiplied as one matrix.

    Attributes:
        name: Also of the `Linear` that holds them, in its block.
        block: The part of the layer that calls it.
        projections: In the order in which their outputs lie.
        in_features: K.
        has_bias: Whether all of them add one.
        split: What ranks share. "columns": the outputs; "heads": the outputs, in whole heads; "rows": the inputs, and
            the outputs, which all ranks get, are added to the residual stream.
        norm: The norm of the layer that gives its inputs; None: the block computes them.
        factor: The projection that its inputs are multiples of, channel by channel: a scale of the inputs can be
            taken from there. Norms are such, too.
    """

    name: str
    block: Block
    projections: tuple[Projection, ...]
    in_features: Width
    has_bias: Callable[[ModelConfig], bool]
    split: Literal["columns", "heads", "rows"]
    norm: str | None = None
    factor: str | None = None

    def out_features(self, config: ModelConfig) -> int:
        """Output features of all its projections together."""
        return sum(projection.out_features(config) for projection in self.projections)

    def modules(self, layer: str) -> list[str]:
        """Its projections' names in a checkpoint; layer: like "model.layers.0"."""
        return [f"{layer}.{projection.name}" for projection in self.projections]


def _hidden(config: ModelConfig) -> int:
    return config.hidden_size


def _queries(config: ModelConfig) -> int:
    return config.num_heads * config.head_dim


def _keys(config: ModelConfig) -> int:
    return config.num_kv_heads * config.head_dim


def _inner(config: ModelConfig) -> int:
    return config.intermediate_size


ROLES = (
    Role(
        name="qkv",
        block="attention",
        projections=(
            Projection("self_attn.q_proj", "attn_q", _queries),
            Projection("self_attn.k_proj", "attn_k", _keys),
            Projection("self_attn.v_proj", "attn_v", _keys),
        ),
        in_features=_hidden,
        has_bias=lambda config: config.has_qkv_bias,
        split="heads",
        norm="attention_norm",
    ),
    Role(
        name="output",
        block="attention",
        projections=(Projection("self_attn.o_proj", "attn_output", _hidden),),
        in_features=_queries,
        has_bias=lambda config: config.has_output_bias,
        split="rows",
    ),
    Role(
        name="gate_up",
        block="MLP",
        projections=(
            Projection("mlp.gate_proj", "ffn_gate", _inner),
            Projection("mlp.up_proj", "ffn_up", _inner),
        ),
        in_features=_hidden,
        has_bias=lambda config: config.has_mlp_bias,
        split="columns",
        norm="mlp_norm",
    ),
    Role(
        name="down",
        block="MLP",
        projections=(Projection("mlp.down_proj", "ffn_down", _hidden),),
        in_features=_inner,
        has_bias=lambda config: config.has_mlp_bias,
        split="rows",
        factor="mlp.up_proj",
    ),
)
"""In the order in which a layer computes them."""

NORMS = tuple(dict.fromkeys(role.norm for role in ROLES if role.norm is not None))
"""Those that give projections their inputs, as a layer names them."""


def readers(norm: str) -> list[Role]:
    """The roles whose inputs a norm gives."""
    return [role for role in ROLES if role.norm == norm]


def first_of_product(module: str) -> str:
    """The first of the projections that are multiplied as one matrix with this module; itself where it is alone.

    Args:
        module: Like "model.layers.0.self_attn.k_proj".
    """
    for role in ROLES:
        for projection in role.projections:
            if module.endswith(f".{projection.name}"):
                return module.removesuffix(projection.name) + role.projections[0].name
    return module


def module_names(config: ModelConfig) -> list[str]:
    """The modules whose weights a specification may name, in the checkpoint's names."""
    layers = [f"model.layers.{layer}" for layer in range(config.num_layers)]
    return [EMBEDDING, *(name for layer in layers for role in ROLES for name in role.modules(layer)), LM_HEAD]


def split_outputs(config: ModelConfig) -> int:
    """Outputs that ranks share, of all projections of a layer together."""
    return sum(role.out_features(config) for role in ROLES if role.split != "rows")


def split_inputs(config: ModelConfig) -> int:
    """Inputs that ranks share, of all projections of a layer together."""
    return sum(role.in_features(config) for role in ROLES if role.split == "rows")
