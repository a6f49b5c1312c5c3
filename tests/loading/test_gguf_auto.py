"""GGUF under `--quant auto`: each matrix on the grid of its type."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from engine.config import EngineConfig
from engine.executor.runner import ModelRunner
from engine.loading.checkpoint import open_checkpoint
from engine.loading.slices import take_slices
from engine.models.config import ModelConfig
from engine.models.linear import Linear
from engine.models.modules import module_names
from engine.models.splits import ColumnParallel
from engine.parallel.group import TensorGroup
from engine.parallel.shards import Shard
from engine.quant.block_weight import BlockWeight
from engine.quant.blocks import Blocks
from engine.quant.weight import to_float
from engine.quant_spec import EMBEDDING, LM_HEAD
from tests.helpers.block_weights import random_block_weight
from tests.helpers.gguf_file import write_gguf_model
from tests.helpers.paged import make_sequences, run_chunks
from tests.helpers.tiny import TINY_CONFIGS
from tests.models.test_quantized_models import relative_error

CHUNKS = [[26, 1], [7, 12, 1]]
DOWN = "model.layers.0.mlp.down_proj"


def write(path: Path, kind: Type | None, kinds: dict[str, Type] | None = None, **changes: Any) -> Path:
    config = deepcopy(TINY_CONFIGS["llama"])
    config.intermediate_size = 96
    for name, value in changes.items():
        setattr(config, name, value)
    write_gguf_model(path / "model.gguf", config, kind, kinds)
    return path / "model.gguf"


def runner_of(path: Path, quant: str = "auto", **options: Any) -> ModelRunner:
    config = EngineConfig(
        model=str(path), quant=quant, kv_cache_memory="1MiB", cache_dir=str(path.parent / "cache"), **options
    )
    return ModelRunner(config, open_checkpoint(path))


def schemes(path: Path) -> dict[str, str]:
    checkpoint = open_checkpoint(path)
    quant_spec = runner_of(path).config.quant_spec
    modules = module_names(ModelConfig.from_dict(checkpoint.config))
    return {module: str(quant_spec.of(module)) for module in modules}


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1], ids=lambda kind: kind.name)
def test_types_are_kept(kind: Type, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    found = schemes(path)
    name = kind.name.lower()
    assert set(found.values()) == {name}
    weight = open_checkpoint(path).tensor(f"{DOWN}.weight")
    stored = BlockWeight(name, Blocks(name).quantize(weight), weight.shape[1])
    assert torch.equal(stored.dequantize(), to_float(weight))


def test_q8_0_is_int8_in_groups(tmp_path: Path) -> None:
    assert set(schemes(write(tmp_path, Type.Q8_0)).values()) == {"int8", "int8:g32"}


def test_types_may_differ_in_one_product(tmp_path: Path) -> None:
    """As llama.cpp mixes them: attention's values finer than queries and keys."""
    kinds = {"attn_v": Type.Q5_1, "attn_k": Type.Q8_0, "ffn_up": Type.Q4_1}
    path = write(tmp_path, Type.Q4_0, kinds)
    found = schemes(path)
    layer = "model.layers.1"
    names = {
        f"{layer}.self_attn.q_proj": "q4_0",
        f"{layer}.self_attn.k_proj": "int8:g32",
        f"{layer}.self_attn.v_proj": "q5_1",
        f"{layer}.mlp.gate_proj": "q4_0",
        f"{layer}.mlp.up_proj": "q4_1",
    }
    assert names.items() <= found.items()
    check_logits(path)


@pytest.mark.parametrize("size", [2, 3])
def test_types_that_differ_are_split_over_ranks(size: int) -> None:
    """Each rank's rows of a stack are those of the whole."""
    weights = {
        "a": random_block_weight("q4_0", 12, 64),
        "b": random_block_weight("q5_1", 6, 64),
        "c": random_block_weight("q5_1", 6, 64),
    }
    schemes = [Blocks("q4_0"), Blocks("q5_1"), Blocks("q5_1")]
    x = torch.randn(3, 64)

    def outputs(rank: int, size: int) -> list[torch.Tensor]:
        split = ColumnParallel(TensorGroup(Shard(rank, size), None))
        linear = Linear(list(weights), 64, [12, 6, 6], schemes, False, split)
        linear.load(lambda name, part: take_slices(weights[name.removesuffix(".weight")], part, name))
        linear.bind()
        return list(linear(x).split([size_ // size for size_ in (12, 6, 6)], dim=1))

    whole = outputs(0, 1)
    parts = [outputs(rank, size) for rank in range(size)]
    for index, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts], dim=1), expected)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_logits_are_near_those_of_its_floats(kind: Type, tmp_path: Path) -> None:
    check_logits(write(tmp_path, kind))


def check_logits(path: Path) -> None:
    cache = {"kv_cache_dtype": "float32"}
    computed, expected = (
        run_chunks(runner_of(path, quant, **cache), make_sequences(320, CHUNKS), CHUNKS)
        for quant in ("auto", "none")
    )
    for one, other in zip(computed, expected, strict=True):
        logits, floats = (torch.stack(list(rows.values())) for rows in (one, other))
        # What activations of eight bits cost with such weights; two terms of them make it 0.0005.
        assert relative_error(logits, floats) < 0.1


def test_floats_stay_floats(tmp_path: Path) -> None:
    assert set(schemes(write(tmp_path, None)).values()) == {"none"}


def test_modules_of_floats_and_those_that_share_their_product(tmp_path: Path) -> None:
    found = schemes(write(tmp_path, Type.Q8_0, {"blk.1.attn_k": Type.F16, "blk.2.ffn_down": Type.F32}))
    layers = {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"} | {"model.layers.2.mlp.down_proj"}
    assert {module for module, words in found.items() if words == "none"} == layers


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0], ids=lambda kind: kind.name)
def test_a_table_and_the_head_that_is_tied_to_it(kind: Type, tmp_path: Path) -> None:
    found = schemes(write(tmp_path, Type.Q8_0, {"token_embd": kind}, tie_word_embeddings=True))
    expected = ("none", "none") if kind == Type.F16 else ("int8", "int8:g32")
    assert (found[EMBEDDING], found[LM_HEAD]) == expected


def test_what_is_rounded_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, Type.Q8_0, {"ffn_down": Type.TQ2_0}, intermediate_size=256)
    runner_of(path, "none")
    assert not caplog.records
    runner_of(path)
    assert "matrices of TQ2_0 (3) run as int8:g32" in caplog.text


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q5_0, Type.Q4_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_a_table_is_looked_up_as_the_file_has_it(kind: Type, is_tied: bool, tmp_path: Path) -> None:
    path = write(tmp_path, Type.Q8_0, {"token_embd": kind}, tie_word_embeddings=is_tied)
    embedding = runner_of(path).model.embedding
    assert embedding is not None
    expected = to_float(open_checkpoint(path).tensor(f"{EMBEDDING}.weight"))
    assert torch.equal(embedding(torch.arange(len(expected), dtype=torch.int32)), expected)


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_other_choices_are_as_they_were(quant: str, tmp_path: Path) -> None:
    found = str(runner_of(write(tmp_path, Type.Q8_0), quant).config.quant_spec)
    assert found.partition(":")[0] == quant
