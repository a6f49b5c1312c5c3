"""The shape of every tensor that a model reads, by its Hugging Face name.

A tensor of another shape would go unnoticed where matrices are stacked, and fail far from its cause elsewhere.
"""

from __future__ import annotations

import re

from engine.models.config import ModelConfig
from engine.quant_spec import EMBEDDING, LM_HEAD

_LAYER = re.compile(r"model\.layers\.\d+\.")


def tensor_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The shape that a tensor must have.

    Args:
        name: Of a tensor that the model reads, like "model.layers.0.self_attn.q_proj.weight".
    """
    module, _, kind = name.rpartition(".")
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        LM_HEAD: (config.vocab_size, hidden),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    # The others are norms over hidden states.
    shape = shapes.get(_LAYER.sub("", module), (hidden,))
    return shape[:1] if kind == "bias" else shape
