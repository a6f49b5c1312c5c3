"""The tensors that a model reads, by their Hugging Face names, and the shape of each.

A tensor of another shape would go unnoticed where matrices are stacked, and fail far from its cause elsewhere.
"""

from __future__ import annotations

import re

from engine.models.config import ModelConfig
from engine.models.modules import ROLES
from engine.quant_spec import EMBEDDING, LM_HEAD

_LAYER = re.compile(r"model\.layers\.\d+\.")


def tensor_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The shape that a tensor must have.

    Args:
        name: Of a tensor that the model reads, like "model.layers.0.self_attn.q_proj.weight".
    """
    module, _, kind = name.rpartition(".")
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        LM_HEAD: (config.vocab_size, hidden),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
        **{
            projection.name: (projection.out_features(config), role.in_features(config))
            for role in ROLES
            for projection in role.projections
        },
    }
    # The others are norms over hidden states.
    shape = shapes.get(_LAYER.sub("", module), (hidden,))
    return shape[:1] if kind == "bias" else shape


def tensor_names(config: ModelConfig) -> set[str]:
    """The tensors that a model reads, whatever they are stored as: a tied head is none."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.has_post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if config.has_query_key_norm:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    names = {f"{EMBEDDING}.weight", "model.norm.weight"}
    if not config.ties_embeddings:
        names.add(f"{LM_HEAD}.weight")
    for layer in (f"model.layers.{index}" for index in range(config.num_layers)):
        names |= {f"{layer}.{norm}.weight" for norm in norms}
        for role in ROLES:
            kinds = ("weight", "bias") if role.has_bias(config) else ("weight",)
            names |= {f"{module}.{kind}" for module in role.modules(layer) for kind in kinds}
    return names
