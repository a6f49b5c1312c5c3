"""Tiny random checkpoints of every supported family, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

ORIGINAL_LENGTH = 32
"""Positions before a rope is stretched."""

MAX_LENGTH = 256
SLIDING_WINDOW = 24

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": False,
    # The defaults are ids of large vocabularies.
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _llama(rope: dict[str, Any] | None = None, **options: Any) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})}
    return LlamaConfig(**{**_SIZES, "rope_parameters": rope, **options})


TINY_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": _llama(),
    "llama-llama3": _llama(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
        }
    ),
    "llama-linear": _llama({"rope_type": "linear", "factor": MAX_LENGTH / ORIGINAL_LENGTH}),
    "llama-yarn": _llama(
        {
            "rope_type": "yarn",
            "factor": MAX_LENGTH / ORIGINAL_LENGTH,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
        }
    ),
    "llama-biases": _llama(attention_bias=True, mlp_bias=True),
    "smollm2": _llama(
        {"rope_theta": 100000.0},
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "mistral": MistralConfig(**_SIZES, head_dim=24, sliding_window=SLIDING_WINDOW),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen2-sliding": Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=SLIDING_WINDOW, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**_SIZES, head_dim=32),
    "gemma3": Gemma3TextConfig(
        **{
            **_SIZES,
            "num_hidden_layers": 7,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        head_dim=24,
        query_pre_attn_scalar=40,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention" if (i + 1) % 3 else "full_attention" for i in range(7)],
    ),
}


def write_checkpoint(path: Path, config: PreTrainedConfig, seed: int = 0) -> None:
    """Writes a model directory with random float32 weights that make every part of the model matter."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.save_pretrained(path)


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Gives the model weights under which attention is uneven, and norms and biases are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    # Gemma multiplies by 1 + weight.
    neutral_norm = 0.0 if model.config.model_type == "gemma3_text" else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(neutral_norm + 0.3 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 * parameter.shape[1] ** -0.5 * noise)


def load_reference(path: Path) -> PreTrainedModel:
    """The model of a directory as transformers runs it, with attention written out, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence, computed at once."""
    logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits
    return logits[0].float()
