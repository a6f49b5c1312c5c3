"""A GGUF file of random weights, for peers that need one to be measured: `python -m benchmarks.random_gguf --help`.

llama.cpp's llama-quantize makes Q4_0 or Q8_0 of it, and every server loads the same file. Speed depends on a model's
shape and not on what it says; the text that comes out means nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from tqdm import tqdm

from benchmarks.serving import positive_int
from engine.errors import EngineError
from engine.loading.resolve import resolve_model
from engine.models.config import ModelConfig
from engine.models.modules import ROLES

_WEIGHT_SCALE = 0.02  # as models are initialized


def write_model(path: Path, tokenizer: gguf.GGUFReader, config: ModelConfig, seed: int) -> None:
    """Writes a llama in float16 with the vocabulary of another file; norms are ones, in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random weights")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.ropes[0].theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    for name, field in tokenizer.fields.items():
        if name.startswith("tokenizer."):
            element = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], element)

    source = np.random.default_rng(seed)

    def add(name: str, num_rows: int, num_columns: int) -> None:
        weight = source.standard_normal((num_rows, num_columns), dtype=np.float32) * _WEIGHT_SCALE
        writer.add_tensor(f"{name}.weight", weight.astype(np.float16))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(config.hidden_size, dtype=np.float32))

    add("token_embd", config.vocab_size, config.hidden_size)
    for layer in tqdm(range(config.num_layers), unit="layer"):
        for norm in ("attn_norm", "ffn_norm"):
            add_norm(f"blk.{layer}.{norm}")
        for role in ROLES:
            for projection in role.projections:
                add(
                    f"blk.{layer}.{projection.gguf}",
                    projection.out_features(config),
                    role.in_features(config),
                )
    add_norm("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; the defaults are the shape of Llama-3.2-1B."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_gguf",
        description="Write a llama of random weights; the defaults are the shape of Llama-3.2-1B.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="the file to write, in float16")
    parser.add_argument("--tokenizer", default="llama", help="alias or GGUF file whose vocabulary it gets")
    for name, size, meaning in (
        ("layers", 16, "layers"),
        ("hidden-size", 2048, "elements of a hidden state"),
        ("intermediate-size", 8192, "inner features of the MLP"),
        ("heads", 32, "query heads"),
        ("kv-heads", 8, "key heads"),
        ("context", 8192, "longest sequence"),
    ):
        parser.add_argument(f"--{name}", type=positive_int, default=size, help=meaning)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; 2 if there is no such tokenizer, or the shape makes no model."""
    options = parse_arguments(arguments)
    try:
        tokenizer = gguf.GGUFReader(resolve_model(options.tokenizer))
        settings = {
            "model_type": "llama",
            "vocab_size": len(tokenizer.fields["tokenizer.ggml.tokens"].data),
            "hidden_size": options.hidden_size,
            "intermediate_size": options.intermediate_size,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.kv_heads,
            "max_position_embeddings": options.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        }
        write_model(options.output, tokenizer, ModelConfig.from_dict(settings), options.seed)
    except (EngineError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
