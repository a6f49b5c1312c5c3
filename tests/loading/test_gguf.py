"""GGUF files written here, read back as Hugging Face checkpoints."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from engine.errors import CheckpointError
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.loading.resolve import resolve_model
from engine.quant.weight import GridWeight, on_grid, to_float
from tests.helpers.gguf_file import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    VOCAB,
    Float,
    Tensor,
    write_gguf,
)

Write = Callable[..., Path]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write_gguf` into a temporary directory."""

    def write(
        architecture: str = "llama", tensors: dict[str, Tensor] | None = None, **metadata: object
    ) -> Path:
        return write_gguf(tmp_path / "model.gguf", architecture, tensors, **metadata)

    return write


def gguf_row_order(weight: Float, heads: int) -> Float:
    """Rows of a Hugging Face Q or K projection as llama.cpp's converter writes them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_grid_weights_dequantize_to_the_values_of_gguf(
    write: Write, rng: np.random.Generator, kind: Type
) -> None:
    values = rng.standard_normal((INTERMEDIATE, HIDDEN), dtype=np.float32)
    # Extremes: all zero, one value only, huge beside tiny.
    values[0] = 0
    values[1] = 3.0
    values[2, 0] = 6e4
    stored = quantize(values, kind)
    checkpoint = open_checkpoint(write(tensors={"blk.3.ffn_up.weight": (stored, kind)}))
    weight = on_grid(checkpoint.tensor("model.layers.3.mlp.up_proj.weight"))
    assert isinstance(weight, GridWeight)
    assert weight.shape == values.shape
    assert weight.group_size == 32
    assert weight.codes.dtype == (torch.int8 if kind == Type.Q8_0 else torch.uint8)
    assert weight.scale.dtype == torch.float16
    assert (weight.minimum is None) == (kind == Type.Q8_0)
    np.testing.assert_array_equal(weight.dequantize().numpy(), dequantize(stored, kind))


@pytest.mark.parametrize("kind", [Type.TQ1_0, Type.TQ2_0])
def test_other_quantized_types_load_as_float32(write: Write, rng: np.random.Generator, kind: Type) -> None:
    stored = quantize(rng.standard_normal((HIDDEN, 256), dtype=np.float32), kind)
    checkpoint = open_checkpoint(write(tensors={"blk.0.ffn_down.weight": (stored, kind)}))
    weight = checkpoint.tensor("model.layers.0.mlp.down_proj.weight")
    assert isinstance(weight, torch.Tensor)
    assert weight.dtype == torch.float32
    np.testing.assert_array_equal(weight.numpy(), dequantize(stored, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_types_keep_their_dtype_and_bits(write: Write, dtype: torch.dtype) -> None:
    expected = torch.randn(HIDDEN, INTERMEDIATE).to(dtype)
    if dtype == torch.bfloat16:
        stored = (expected.view(torch.uint8).numpy(), Type.BF16)
    else:
        stored = (expected.numpy(), Type.F32 if dtype == torch.float32 else Type.F16)
    checkpoint = open_checkpoint(write(tensors={"output.weight": stored}))
    weight = checkpoint.tensor("lm_head.weight")
    assert isinstance(weight, torch.Tensor)
    assert weight.dtype == dtype
    assert torch.equal(weight, expected)
    weight.zero_()  # a tensor of its own: neither read-only nor shared with the file
    assert torch.equal(to_float(checkpoint.tensor("lm_head.weight")), expected)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q5_0], ids=lambda kind: kind.name)
def test_llama_query_and_key_rows_are_in_hugging_face_order(
    write: Write, rng: np.random.Generator, kind: Type
) -> None:
    query = rng.standard_normal((HEADS * HEAD_DIM, HIDDEN), dtype=np.float32)
    key = rng.standard_normal((KV_HEADS * HEAD_DIM, HIDDEN), dtype=np.float32)
    key_codes = quantize(gguf_row_order(key, KV_HEADS), kind)
    bias = rng.standard_normal(HEADS * HEAD_DIM, dtype=np.float32)
    checkpoint = open_checkpoint(
        write(
            tensors={
                "blk.0.attn_q.weight": gguf_row_order(query, HEADS),
                "blk.0.attn_q.bias": gguf_row_order(bias, HEADS),
                "blk.0.attn_k.weight": (key_codes, kind),
            }
        )
    )
    prefix = "model.layers.0.self_attn"
    np.testing.assert_array_equal(to_float(checkpoint.tensor(f"{prefix}.q_proj.weight")).numpy(), query)
    np.testing.assert_array_equal(to_float(checkpoint.tensor(f"{prefix}.q_proj.bias")).numpy(), bias)
    expected_key = dequantize(quantize(key, kind), kind)
    np.testing.assert_array_equal(
        to_float(checkpoint.tensor(f"{prefix}.k_proj.weight")).numpy(), expected_key
    )


def test_llama_row_order_keeps_attention_scores(write: Write, rng: np.random.Generator) -> None:
    """Interleaved rotation of the file's rows and half rotation of the checkpoint's rows agree."""
    stored_query = rng.standard_normal((HEADS * HEAD_DIM, HIDDEN), dtype=np.float32)
    stored_key = rng.standard_normal((KV_HEADS * HEAD_DIM, HIDDEN), dtype=np.float32)
    checkpoint = open_checkpoint(
        write(tensors={"blk.0.attn_q.weight": stored_query, "blk.0.attn_k.weight": stored_key})
    )
    hidden = rng.standard_normal((2, HIDDEN), dtype=np.float32)
    angles = np.arange(1, 3)[:, None, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    turn = np.exp(1j * angles)

    def interleaved(weight: Float, heads: int) -> Float:
        pairs = (hidden @ weight.T).reshape(2, heads, HEAD_DIM // 2, 2)
        return (pairs[..., 0] + 1j * pairs[..., 1]) * turn

    def halves(weight: Float, heads: int) -> Float:
        parts = (hidden @ weight.T).reshape(2, heads, 2, HEAD_DIM // 2)
        return (parts[:, :, 0] + 1j * parts[:, :, 1]) * turn

    prefix = "model.layers.0.self_attn"
    query = to_float(checkpoint.tensor(f"{prefix}.q_proj.weight")).numpy()
    key = to_float(checkpoint.tensor(f"{prefix}.k_proj.weight")).numpy()
    # Head 0 of the query against head 0 of the key, at positions 1 and 2.
    expected = (interleaved(stored_query, HEADS)[0, 0] * interleaved(stored_key, KV_HEADS)[1, 0].conj()).real
    actual = (halves(query, HEADS)[0, 0] * halves(key, KV_HEADS)[1, 0].conj()).real
    np.testing.assert_allclose(actual.sum(), expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_are_left_alone(write: Write, rng: np.random.Generator, architecture: str) -> None:
    query = rng.standard_normal((HEADS * HEAD_DIM, HIDDEN), dtype=np.float32)
    bias = rng.standard_normal(HEADS * HEAD_DIM, dtype=np.float32)
    norm = rng.standard_normal(HEAD_DIM, dtype=np.float32)
    tensors = {"blk.7.attn_q.weight": query, "blk.0.attn_q.bias": bias, "blk.7.attn_q_norm.weight": norm}
    checkpoint = open_checkpoint(write(architecture, tensors))
    assert checkpoint.config["model_type"] == architecture
    assert checkpoint.config["attention_bias"] is True
    prefix = "model.layers.7.self_attn"
    np.testing.assert_array_equal(to_float(checkpoint.tensor(f"{prefix}.q_proj.weight")).numpy(), query)
    np.testing.assert_array_equal(to_float(checkpoint.tensor(f"{prefix}.q_norm.weight")).numpy(), norm)


def test_gemma_norms_names_and_layer_types(write: Write, rng: np.random.Generator) -> None:
    names = {
        "output_norm": "model.norm",
        "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.0.post_attention_norm": "model.layers.0.post_attention_layernorm",
        "blk.0.ffn_norm": "model.layers.0.pre_feedforward_layernorm",
        "blk.0.post_ffw_norm": "model.layers.0.post_feedforward_layernorm",
        "blk.0.attn_q_norm": "model.layers.0.self_attn.q_norm",
        "blk.0.attn_k_norm": "model.layers.0.self_attn.k_norm",
    }
    norms = {name: rng.standard_normal(HIDDEN, dtype=np.float32) for name in names}
    tensors = {f"{name}.weight": weight + 1 for name, weight in norms.items()}
    checkpoint = open_checkpoint(
        write("gemma3", tensors, sliding_window=16, rope_freq_base=1e6, add_bos_token=True)
    )
    for gguf_name, name in names.items():
        weight = to_float(checkpoint.tensor(f"{name}.weight"))
        np.testing.assert_allclose(weight.numpy(), norms[gguf_name], atol=1e-6)
    config = checkpoint.config
    assert config["model_type"] == "gemma3_text"
    assert config["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 2
    assert config["sliding_window"] == 16
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["query_pre_attn_scalar"] == HEAD_DIM
    assert config["hidden_activation"] == "gelu_pytorch_tanh"


def test_config_of_a_llama_file(write: Write, rng: np.random.Generator) -> None:
    checkpoint = open_checkpoint(write(rope_freq_base=5e5))
    expected = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 12,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    assert {key: checkpoint.config[key] for key in expected} == expected
    head = rng.standard_normal((VOCAB, HIDDEN), dtype=np.float32)
    assert open_checkpoint(write(tensors={"output.weight": head})).config["tie_word_embeddings"] is False


def llama3_divisors(scaling: dict[str, object]) -> Float:
    """The tensor that a Llama 3 file carries, from transformers' own frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        rope_parameters={"rope_theta": 5e5, **scaling},
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / frequencies.numpy()).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recognized(write: Write, factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    tensors = {"rope_freqs.weight": llama3_divisors(scaling)}
    checkpoint = open_checkpoint(write(tensors=tensors, rope_freq_base=5e5))
    assert checkpoint.config["rope_scaling"] == scaling
    assert checkpoint.names() == {"model.embed_tokens.weight"}


def test_unknown_rope_divisors_are_refused(write: Write) -> None:
    tensors = {"rope_freqs.weight": np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        open_checkpoint(write(tensors=tensors, rope_freq_base=5e5))


def test_linear_and_yarn_scaling(write: Write) -> None:
    linear = open_checkpoint(
        write(rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=4.0)
    ).config
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = open_checkpoint(
        write(
            rope_scaling_type=gguf.RopeScalingType.YARN,
            rope_scaling_factor=4.0,
            rope_scaling_orig_ctx_len=128,
        )
    ).config
    assert yarn["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


def test_generation_config_names_every_end_token(write: Write) -> None:
    path = write(
        tokenizer_model="gpt2",
        token_list=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<|eot_id|>", "<end_of_turn>"],
        token_types=[3, 3, 3, 1, 1, 4],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    # By their text, whatever their type; but a tag of HTML is ordinary text in this vocabulary.
    expected = {"bos_token_id": 1, "eos_token_id": [2, 0, 4, 5], "pad_token_id": 0}
    assert open_checkpoint(path).generation_config == expected


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(path), *words]:
        assert word in message


def test_missing_tensor_is_named(write: Write) -> None:
    checkpoint: Checkpoint = open_checkpoint(write())
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight")


def test_unknown_tensors_and_architectures_are_refused(write: Write) -> None:
    assert_refused(write(tensors={"blk.0.ffn_gate_inp.weight": np.ones(4, np.float32)}), "ffn_gate_inp")
    assert_refused(write("rwkv7"), "rwkv7", "llama")


def test_unsupported_types_are_refused(write: Write) -> None:
    """Bytes of a real type that no test here covers, and of one that does not exist."""
    stored = np.zeros((HIDDEN, 292), dtype=np.uint8)
    path = write(tensors={"blk.0.ffn_down.weight": (stored, Type.Q8_K)})
    assert_refused(path, "'blk.0.ffn_down.weight'", "Q8_K", "supported are", "Q4_K", "BF16")
    data = path.read_bytes()
    number = struct.pack("<I", Type.Q8_K)
    place = data.index(number, data.index(b"blk.0.ffn_down.weight"))
    path.write_bytes(data[:place] + struct.pack("<I", 99) + data[place + 4 :])
    assert_refused(path, "'blk.0.ffn_down.weight'", "unknown type 99")


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_truncated_data_is_named(write: Write, kind: Type) -> None:
    """The last tensor's; GGUF pads data to multiples of 32 bytes, which all of these are."""
    _, block_bytes = GGML_QUANT_SIZES[kind]
    stored = np.zeros((HIDDEN, 8 * block_bytes), dtype=np.uint8)
    if kind == Type.F32:
        stored = stored.view(np.float32)
    path = write(tensors={"blk.0.ffn_down.weight": (stored, kind)})
    checkpoint = open_checkpoint(path)
    assert "model.layers.0.mlp.down_proj.weight" in checkpoint.names()
    path.write_bytes(path.read_bytes()[:-100])
    size = HIDDEN * 8 * block_bytes
    words = [f"expected {size} bytes of {kind.name}", f"found {size - 100}"]
    assert_refused(path, "'blk.0.ffn_down.weight'", *words)


def test_rows_of_broken_blocks_are_named(write: Write) -> None:
    stored = np.zeros((HIDDEN, 2 * 34), dtype=np.uint8)
    path = write(tensors={"blk.0.ffn_down.weight": (stored, Type.Q8_0)})
    data = path.read_bytes()
    name = data.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight")
    place = name + 4  # behind the number of dimensions
    assert struct.unpack_from("<QQ", data, place) == (64, HIDDEN)
    path.write_bytes(data[:place] + struct.pack("<Q", 63) + data[place + 8 :])
    words = ["'blk.0.ffn_down.weight'", "whole Q8_0 blocks of 32", f"[{HIDDEN}, 63]"]
    assert_refused(path, *words)


def test_query_rows_that_are_no_whole_heads_are_named(write: Write) -> None:
    checkpoint = open_checkpoint(write(tensors={"blk.0.attn_q.weight": np.zeros((60, HIDDEN), np.float32)}))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.weight': expected 64 rows.*found 60"):
        checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")


def test_damaged_files_are_refused(write: Write, tmp_path: Path) -> None:
    path = write(token_list=["a", "b"])
    data = path.read_bytes()
    for length in (0, 3, 20, 100, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:length])
        assert_refused(path, "download it again")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"not a model" * 100)
    assert_refused(other)
    assert_refused(tmp_path / "absent.gguf")
    assert_refused(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scaling.factor": 1.0}, None),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, None),
        (
            {
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_beta_slow": 2.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
        (
            {
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.attn_factor": 0.5,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "attention_factor": 0.5 * (0.1 * math.log(4.0) + 1.0),
            },
        ),
    ],
)
def test_rope_scaling_as_llama_cpp_reads_it(
    write: Write, metadata: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    assert open_checkpoint(write(metadata=metadata)).config["rope_scaling"] == scaling


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logit_scale", 1.0),
        ("expert_count", 0),
        ("attention.causal", True),
        ("attention.scale", HEAD_DIM**-0.5),
        ("attention.value_length", HEAD_DIM),
        ("attention.sliding_window", 512),
        ("rope.scaling.finetuned", True),
        ("tensor_data_layout", "Meta AI original pth"),
        ("vocab_size", VOCAB),
    ],
)
def test_keys_that_change_nothing(write: Write, key: str, value: Any) -> None:
    plain = open_checkpoint(write()).config
    assert open_checkpoint(write(metadata={f"llama.{key}": value})).config == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logit_scale", 0.5),
        ("embedding_scale", 12.0),
        ("expert_count", 8),
        ("attention.causal", False),
        ("attention.scale", 0.1),
        ("attention.value_length", 2 * HEAD_DIM),
        ("final_logit_softcapping", 30.0),
        ("rope.scaling.attn_factor", 0.5),
        ("rope.scaling.alpha", 2.0),
        ("rope.dimension_sections", [1, 2, 3]),
        ("rope.dimension_count_swa", 8),
        ("something.new", 1),
    ],
)
def test_keys_that_make_another_model(write: Write, key: str, value: Any) -> None:
    assert_refused(write(metadata={f"llama.{key}": value}), f"llama.{key}")


def test_a_window_of_files_that_say_llama(write: Write) -> None:
    config = open_checkpoint(write(sliding_window=64)).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)
    assert_refused(write("qwen2", sliding_window=64), "qwen2.attention.sliding_window")


def test_layers_with_windows_by_layer(write: Write) -> None:
    pattern = [True, False] * 6
    metadata = {"gemma3.attention.sliding_window_pattern": pattern}
    config = open_checkpoint(write("gemma3", sliding_window=16, rope_freq_base=1e6, metadata=metadata)).config
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 6


def test_parts_of_a_model(tmp_path: Path) -> None:
    """What llama-gguf-split writes: metadata in the first part, tensors in all of them."""
    rng = np.random.default_rng(0)
    tensors = {
        f"blk.{layer}.ffn_norm.weight": rng.standard_normal(HIDDEN, dtype=np.float32) for layer in range(2)
    }
    first, second = (tmp_path / f"model-0000{part}-of-00002.gguf" for part in (1, 2))
    names = list(tensors)
    write_gguf(first, tensors={names[0]: tensors[names[0]]}, metadata={"split.no": 0, "split.count": 2})
    writer = gguf.GGUFWriter(second, "llama")
    writer.add_uint32("split.no", 1)
    writer.add_uint32("split.count", 2)
    writer.add_tensor(names[1], tensors[names[1]])
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    assert resolve_model(str(tmp_path)) == first
    checkpoint = open_checkpoint(first)
    for layer, stored in enumerate(tensors.values()):
        weight = checkpoint.tensor(f"model.layers.{layer}.post_attention_layernorm.weight")
        assert torch.equal(to_float(weight), torch.from_numpy(stored))
    assert_refused(second, "part 2 of 2; the first, model-00001-of-00002.gguf, opens all of them")
    second.unlink()
    assert_refused(first, "model-00002-of-00002.gguf is missing")


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    assert_refused(tmp_path / "big.gguf", "big-endian")
