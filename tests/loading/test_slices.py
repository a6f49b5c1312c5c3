"""Ranks read their parts of a checkpoint: the right numbers, and not a byte of the others'."""

from __future__ import annotations

import json
import math
import struct
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import quantize
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.loading.resolve import resolve_model
from engine.loading.slices import take_slices
from engine.loading.weights import read_checked
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.shapes import tensor_shape
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline
from engine.parallel.shards import WHOLE, Shard, Slices
from engine.quant.block_weight import BlockWeight
from engine.quant.plan import QuantizationPlan
from engine.quant.weight import CodebookWeight, GridWeight, RotatedWeight, Weight, to_float
from engine.quant_spec import parse_quant_spec
from tests.helpers.gguf_file import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, write_gguf
from tests.helpers.quantized_directory import write_directory
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

SECOND_HALF = slice(VOCAB // 2, VOCAB)


def parts_of_rank(
    config: ModelConfig, rank: int, size: int, rank_invariant: bool = True
) -> list[tuple[str, Slices]]:
    """What a rank reads, by asking the layers themselves."""
    asked: list[tuple[str, Slices]] = []

    def read(name: str, part: Slices) -> torch.Tensor:
        asked.append((name, part))
        return take_slices(torch.empty(tensor_shape(config, name), device="meta"), part, name)  # type: ignore[return-value]

    quantization = QuantizationPlan(parse_quant_spec("none"), torch.float32)
    group = TensorGroup(Shard(rank, size), rank_invariant=rank_invariant)
    Decoder(config, quantization, torch.float32, group, Pipeline()).load(read)
    return asked


def tensors_of(weight: Weight) -> list[torch.Tensor]:
    """What a weight is made of, its kind and group size apart."""
    if isinstance(weight, torch.Tensor):
        return [weight]
    if isinstance(weight, BlockWeight):
        return [weight.parts[name] for name in sorted(weight.parts)]
    tensors = [weight.codes, weight.scale]
    tensors.append(weight.codebook if isinstance(weight, CodebookWeight) else weight.minimum)
    return [tensor for tensor in tensors if tensor is not None]


def assert_same(one: Weight, other: Weight) -> None:
    assert type(one) is type(other)
    for attribute in ("group_size", "kind", "shape"):
        assert getattr(one, attribute, None) == getattr(other, attribute, None)
    for left, right in zip(tensors_of(one), tensors_of(other), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def safetensors_bytes(file: Path) -> dict[str, int]:
    """Bytes of each tensor, as the file's header has it (safetensors' README: length, then JSON)."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def expected_bytes(name: str, whole: int, config: ModelConfig, size: int) -> int:
    """What a rank may read of a tensor of so many bytes: its share of what is cut, and norms whole."""
    if "norm" in name:
        return whole
    if (".k_proj." in name or ".v_proj." in name) and config.num_kv_heads < size:
        return whole // config.num_kv_heads
    assert whole % size == 0
    return whole // size


@pytest.mark.parametrize("rank_invariant", [True, False], ids=["exact", "summed"])
@pytest.mark.parametrize(
    ("family", "size"), [("llama-biases", 2), ("smollm2", 3), ("gemma3", 4), ("qwen2", 4)]
)
def test_safetensors_are_read_in_shares(tmp_path: Path, family: str, size: int, rank_invariant: bool) -> None:
    hugging_face = deepcopy(TINY_CONFIGS[family])
    hugging_face.intermediate_size, hugging_face.vocab_size = 96, 312  # shared by three, too
    write_checkpoint(tmp_path, hugging_face)
    stored = safetensors_bytes(tmp_path / "model.safetensors")
    whole = open_checkpoint(tmp_path)
    config = ModelConfig.from_dict(whole.config)
    for rank in range(size):
        checkpoint = open_checkpoint(tmp_path)
        seen = set()
        for name, part in parts_of_rank(config, rank, size, rank_invariant):
            before = checkpoint.num_bytes_read
            assert_same(
                read_checked(checkpoint, config, name, part), take_slices(whole.tensor(name), part, name)
            )
            expected = expected_bytes(name, stored[name], config, size)
            # A sum's bias is added by one rank, but read by all; a tied head reads the embedding again.
            is_summed_bias = not rank_invariant and name.endswith((".o_proj.bias", ".down_proj.bias"))
            assert checkpoint.num_bytes_read - before == (stored[name] if is_summed_bias else expected), name
            seen.add(name)
        assert seen == set(stored)


@pytest.mark.parametrize("rank_invariant", [True, False], ids=["exact", "summed"])
def test_smollm2_is_read_in_thirds(rank_invariant: bool) -> None:
    """Embedding, last norm, and two of the thirty layers, which are alike."""
    path = resolve_model("llama")
    layers = ("blk.0.", "blk.29.")
    stored = {
        tensor.name: int(tensor.n_bytes)
        for tensor in GGUFReader(path).tensors
        if tensor.name.startswith((*layers, "token_embd", "output"))
    }
    norms = sum(size for name, size in stored.items() if "norm" in name)
    whole = open_checkpoint(path)
    config = ModelConfig.from_dict(whole.config)
    for rank in range(3):
        checkpoint = open_checkpoint(path)
        for name, part in parts_of_rank(config, rank, 3, rank_invariant):
            if ".layers." not in name or ".layers.0." in name or ".layers.29." in name:
                weight = read_checked(checkpoint, config, name, part)
                assert_same(weight, take_slices(whole.tensor(name), part, name))
        assert checkpoint.num_bytes_read == norms + (sum(stored.values()) - norms) // 3


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_heads_of_queries_and_keys_are_read_whole(tmp_path: Path, size: int) -> None:
    """Of 4 query heads and 2 key heads, whose rows GGUF orders otherwise, and keys shared by several ranks."""
    random = np.random.default_rng(0)
    query = quantize(random.standard_normal((HEADS * HEAD_DIM, HIDDEN), dtype=np.float32), Type.Q4_1)
    key = random.standard_normal((KV_HEADS * HEAD_DIM, HIDDEN), dtype=np.float32)
    tensors = {
        "blk.0.attn_q.weight": (query, Type.Q4_1),
        "blk.0.attn_k.weight": key,
        "blk.0.attn_k.bias": key[:, 0].copy(),
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", tensors=tensors))
    sources = (("q_proj.weight", HEADS, query.nbytes), ("k_proj.weight", KV_HEADS, key.nbytes))
    for name, heads, num_bytes in (*sources, ("k_proj.bias", KV_HEADS, key[:, 0].nbytes)):
        full = f"model.layers.0.self_attn.{name}"
        for rank in range(size):
            rows = Shard(rank, size).of_heads(heads, HEAD_DIM)
            before = checkpoint.num_bytes_read
            weight = checkpoint.tensor(full, Slices(rows))
            assert checkpoint.num_bytes_read - before == num_bytes // min(size, heads)
            assert_same(weight, take_slices(checkpoint.tensor(full), Slices(rows), full))


def test_rows_that_cut_a_head_are_those_of_the_whole(tmp_path: Path) -> None:
    key = np.random.default_rng(0).standard_normal((KV_HEADS * HEAD_DIM, HIDDEN), dtype=np.float32)
    path = write_gguf(tmp_path / "model.gguf", tensors={"blk.0.attn_k.weight": key})
    checkpoint, name = open_checkpoint(path), "model.layers.0.self_attn.k_proj.weight"
    part = Slices(slice(3, HEAD_DIM + 1), slice(5, 9))
    assert_same(checkpoint.tensor(name, part), take_slices(checkpoint.tensor(name), part, name))


@pytest.mark.parametrize(
    "kind",
    [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_1, Type.TQ2_0],
    ids=lambda kind: kind.name,
)
def test_rows_and_columns_of_every_kind_of_block(tmp_path: Path, kind: Type) -> None:
    columns, block = 512, 256 if kind == Type.TQ2_0 else 32
    values = np.random.default_rng(0).standard_normal((HIDDEN, columns), dtype=np.float32)
    if kind == Type.BF16:
        stored = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy()
    else:
        stored = {Type.F32: values, Type.F16: values.astype(np.float16)}.get(kind)
        stored = quantize(values, kind) if stored is None else stored
    path = write_gguf(tmp_path / "model.gguf", tensors={"blk.0.ffn_down.weight": (stored, kind)})
    checkpoint, name = open_checkpoint(path), "model.layers.0.mlp.down_proj.weight"
    whole = checkpoint.tensor(name)
    for rows, taken in ((None, slice(256, 512)), (slice(7, 9), None), (slice(0, 64), slice(0, 256))):
        before = checkpoint.num_bytes_read
        assert_same(
            checkpoint.tensor(name, Slices(rows, taken)), take_slices(whole, Slices(rows, taken), name)
        )
        num_rows = HIDDEN if rows is None else rows.stop - rows.start
        shard = 1 if taken is None else 2
        assert checkpoint.num_bytes_read - before == stored.nbytes * num_rows // HIDDEN // shard
    cut = Slices(None, slice(8, 24))
    if isinstance(whole, GridWeight | BlockWeight):
        with pytest.raises(CheckpointError, match="columns 8 to 23 cut groups of 32"):
            checkpoint.tensor(name, cut)
        return
    before = checkpoint.num_bytes_read
    assert_same(checkpoint.tensor(name, cut), take_slices(whole, cut, name))
    read = 16 if kind in (Type.F32, Type.F16, Type.BF16) else block
    assert checkpoint.num_bytes_read - before == stored.nbytes * read // columns


def test_columns_of_a_rows_only_group(tmp_path: Path) -> None:
    """A row of 32 is one group, which may be cut."""
    stored = quantize(np.random.default_rng(0).standard_normal((8, 32), dtype=np.float32), Type.Q8_0)
    path = write_gguf(tmp_path / "model.gguf", tensors={"blk.0.ffn_down.weight": (stored, Type.Q8_0)})
    checkpoint, name = open_checkpoint(path), "model.layers.0.mlp.down_proj.weight"
    part = Slices(None, slice(8, 24))
    assert_same(checkpoint.tensor(name, part), take_slices(checkpoint.tensor(name), part, name))


@pytest.mark.parametrize("part", [WHOLE, Slices(slice(0, 20)), Slices(None, slice(0, 32))])
def test_the_whole_tensors_shape_is_checked_whatever_is_read(tmp_path: Path, part: Slices) -> None:
    """One row too many would go unnoticed in the part itself."""
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB + 1, HIDDEN)}
    quantized: dict[str, torch.Tensor] = {
        "lm_head.codes": torch.zeros(VOCAB + 1, HIDDEN, dtype=torch.int8),
        "lm_head.scale": torch.ones(VOCAB + 1, 1),
    }
    (tmp_path / "floats").mkdir()
    (tmp_path / "floats/config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, tmp_path / "floats/model.safetensors")
    method = {"quant_method": "llm-engine", "specification": "int8"}
    own = write_directory(tmp_path / "own", quantized, method)
    gguf = open_checkpoint(
        write_gguf(
            tmp_path / "model.gguf", tensors={"output.weight": np.ones((VOCAB + 1, HIDDEN), np.float32)}
        )
    )
    floats = open_checkpoint(tmp_path / "floats")
    cases: list[tuple[Checkpoint, str]] = [
        (floats, "model.embed_tokens.weight"),
        (own, "lm_head.weight"),
        (gguf, "lm_head.weight"),
    ]
    for checkpoint, name in cases:
        with pytest.raises(CheckpointError, match=rf"{name}.*expected shape \[40, 64\], found \[41, 64\]"):
            checkpoint.tensor(name, part, (VOCAB, HIDDEN))
        checkpoint.tensor(name, part, (VOCAB + 1, HIDDEN))


def test_own_directories_are_read_in_rows(tmp_path: Path) -> None:
    parts = {
        "lm_head.codes": torch.randint(0, 256, (VOCAB, HIDDEN // 2), dtype=torch.uint8),
        "lm_head.scale": torch.rand(VOCAB, 2).half(),
        "lm_head.minimum": torch.rand(VOCAB, 2).half(),
    }
    method = {"quant_method": "llm-engine", "specification": "int4:g32,lm_head=int4:g32"}
    checkpoint = write_directory(tmp_path, parts, method)
    whole = checkpoint.tensor("lm_head.weight")
    num_bytes = checkpoint.num_bytes_read
    assert num_bytes == sum(tensor.nbytes for tensor in parts.values())
    for part in (Slices(SECOND_HALF), Slices(SECOND_HALF, slice(32, 64))):
        before = checkpoint.num_bytes_read
        weight = checkpoint.tensor("lm_head.weight", part)
        assert_same(weight, take_slices(whole, part, "lm_head"))
        assert checkpoint.num_bytes_read - before == num_bytes // 2
    with pytest.raises(CheckpointError, match="columns 8 to 23 cut groups of 32"):
        checkpoint.tensor("lm_head.weight", Slices(SECOND_HALF, slice(8, 24)))


def test_torchs_files_are_read_in_parts(tmp_path: Path) -> None:
    stored = torch.randn(VOCAB, HIDDEN)
    torch.save({"lm_head.weight": stored}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    weight = checkpoint.tensor("lm_head.weight", Slices(SECOND_HALF, slice(8, 24)), (VOCAB, HIDDEN))
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, stored[20:, 8:24])
    assert checkpoint.num_bytes_read == math.prod((20, 16)) * 4


def test_rotated_weights_are_cut_between_blocks() -> None:
    grid = GridWeight(
        torch.randint(0, 16, (8, 320), dtype=torch.uint8),
        torch.rand(8, 5).half(),
        torch.rand(8, 5).half(),
        64,
    )
    weight = RotatedWeight(grid)
    part = take_slices(weight, Slices(slice(2, 6), slice(128, 320)), "w")
    assert isinstance(part, RotatedWeight)
    assert torch.equal(to_float(part), to_float(weight)[2:6, 128:320])
    with pytest.raises(
        CheckpointError, match="columns 64 to 191 cut groups of 128 that are rotated together"
    ):
        take_slices(weight, Slices(None, slice(64, 192)), "w")
