"""python -m engine.plan: its numbers against arithmetic done here, and against what an engine then allocates."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.step_meter import private_bytes
from engine.loading.dummy import DummyCheckpoint
from engine.parallel.exchanges import step_bytes
from engine.plan import EnginePlan, main, plan_engine

GIB = 2**30

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def config_only(path: Path, settings: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(settings))
    return path


def plan(path: Path, settings: dict[str, Any], gpu_memory: int | None, **options: Any) -> EnginePlan:
    config = EngineConfig(model=str(config_only(path, settings)), **options)
    return plan_engine(config, DummyCheckpoint(path).config, gpu_memory)


def test_llama_8b_in_four_bits_over_two_gpus(tmp_path: Path) -> None:
    found = plan(
        tmp_path, LLAMA_8B, 24 * GIB, quant="int4:g128", tensor_parallel_size=2, kv_cache_dtype="int8"
    )
    matrices = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    # Half a byte an element, and two numbers of 16 bits for each 128.
    layers = 32 * (matrices // 2 * 5 // 10 + matrices // 2 // 128 * 4)
    # Half the table and half the head of int8 codes with a 16-bit scale for each 32.
    ends = 2 * 64128 * (4096 + 4096 // 32 * 2)
    norms = 65 * 4096 * 2
    first, second = found.ranks
    assert first.weights == second.weights == layers + ends + norms
    # Keys and values, 4 heads of 128 codes and a float32 scale, in 32 layers.
    assert first.block == 16 * 2 * 32 * 4 * (128 + 4)
    available = int(24 * GIB * 0.9)
    room = available - first.weights - first.activations - first.graphs
    assert first.num_blocks == room // first.block - 1
    assert found.concurrency(1000) == first.num_blocks // 63
    assert first.exchanges is not None
    assert not first.exchanges.has_run
    # Per token in bf16: the embedding's sum; in each layer shares of 2048, 2048, 7168 and 2048; logits of one token.
    one = step_bytes(first.exchanges.exchanges, 1, 1)
    assert one == {"sum": 8192, "gather": 2 * (32 * (3 * 2048 + 7168) + 64128)}
    summed = plan(tmp_path, LLAMA_8B, 24 * GIB, quant="int4:g128", tensor_parallel_size=2, exact_reduce=False)
    assert summed.ranks[0].exchanges is not None
    # Of rows cut to 2048 and 7168 columns; whole groups remain, so that the bytes are the same.
    assert summed.ranks[0].weights == first.weights
    one = step_bytes(summed.ranks[0].exchanges.exchanges, 1, 1)
    assert one == {"sum": 8192 * (1 + 2 * 32), "gather": 2 * 64128}


def test_symmetric_memory_is_said_to_be_unrun_and_brings_graphs(tmp_path: Path) -> None:
    plain = plan(tmp_path, LLAMA_8B, 24 * GIB, tensor_parallel_size=2, exact_reduce=False).ranks[0]
    symmetric = plan(
        tmp_path, LLAMA_8B, 24 * GIB, tensor_parallel_size=2, exact_reduce=False, symmetric_memory=True
    ).ranks[0]
    assert plain.graphs == 0 < symmetric.graphs
    assert "over NCCL; no machine has run this path yet" in str(plain)
    assert "float sums of up to 512.0 KiB over symmetric memory; no machine has run this" in str(symmetric)


def test_symmetric_memory_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for GPUs, not for cpu"):
        plan(tmp_path, SMOLLM2, None, tensor_parallel_size=3, symmetric_memory=True, device="cpu")
    with pytest.raises(ConfigError, match="between ranks"):
        plan(tmp_path, SMOLLM2, GIB, symmetric_memory=True)


def test_smollm2_over_three_gpus(tmp_path: Path) -> None:
    found = plan(tmp_path, SMOLLM2, GIB, tensor_parallel_size=3, max_num_batched_tokens=512, max_num_seqs=8)
    matrices = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    # The head is the table.
    weights = 2 * (30 * matrices // 3 + 49152 * 576 // 3 + 61 * 576)
    assert [rank.weights for rank in found.ranks] == [weights] * 3
    assert found.ranks[0].block == 16 * 2 * 30 * 1 * 64 * 2
    assert found.ranks[0].exchanges is not None
    one = step_bytes(found.ranks[0].exchanges.exchanges, 1, 1)
    assert one == {"sum": 2 * 576, "gather": 2 * (30 * (3 * 192 + 512) + 16384)}


def test_stages_have_their_layers(tmp_path: Path) -> None:
    found = plan(tmp_path, SMOLLM2, GIB, pipeline_parallel_size=4, max_num_batched_tokens=512, max_num_seqs=8)
    matrices = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536 + 2 * 576
    table, layers = 49152 * 576, [8, 8, 7, 7]
    ends = [table, 0, 0, table + 576]
    assert [rank.weights for rank in found.ranks] == [
        2 * (count * matrices + end) for count, end in zip(layers, ends, strict=True)
    ]
    assert len({rank.num_blocks for rank in found.ranks}) == 1
    sent = [rank.exchanges and step_bytes(rank.exchanges.exchanges, 5, 5) for rank in found.ranks]
    assert sent == [{"send": 5 * 2 * 576}] * 3 + [{}]


def test_what_cannot_be_cut_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 ranks cannot share 9 attention heads.*: 1, 3"):
        plan(tmp_path, SMOLLM2, GIB, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"21.6 GiB available - 28.0 GiB weights"):
        plan(tmp_path, LLAMA_8B | {"num_hidden_layers": 64}, 24 * GIB)


def test_the_command_says_what_is_exact_and_what_has_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config_only(tmp_path, LLAMA_8B))
    options = ["--model", path, "--gpu-memory", "80GiB", "--tensor-parallel-size", "2", "--quant", "int8"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "exact: weights, KV cache and exchanged bytes; estimated: activations" in text
    assert "over NCCL; no machine has run this path yet" in text
    assert "of 32768" in text
    assert main([*options[:-3], "5"]) == 1
    assert "5 ranks cannot share 32 attention heads" in capsys.readouterr().err


def test_a_quantized_models_own_grid_is_planned(tmp_path: Path) -> None:
    method = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    found = plan(tmp_path, LLAMA_8B | {"quantization_config": method}, 24 * GIB)
    asked = plan(tmp_path, LLAMA_8B, 24 * GIB, quant="int4:g128")
    assert found.ranks[0].weights == asked.ranks[0].weights
    assert found.config.quant_spec.of("model.layers.3.mlp.up_proj").storage == "int4:g128"


@pytest.mark.process
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("is_exact", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_engine_takes_and_sends_what_was_planned(tmp_path: Path, is_exact: bool) -> None:
    """SmolLM2 in three, 4 of its layers, with random weights."""
    settings = SMOLLM2 | {"num_hidden_layers": 4, "max_position_embeddings": 512}
    options = {
        "quant": "int8",
        "device": "cpu",
        "tensor_parallel_size": 3,
        "exact_reduce": is_exact,
        "kv_cache_memory": "4MiB",
        "load_format": "dummy",
        "num_threads": 1,
    }
    planned = plan(tmp_path, settings, None, **options)
    llm = LLM(str(tmp_path), **options)
    try:
        runner = llm.core.model.runner
        assert str(planned.ranks[0]).splitlines()[1:] == str(runner.plan).splitlines()[1:]
        assert (
            runner.cache.data.nbytes + (0 if runner.cache.scales is None else runner.cache.scales.nbytes)
            == planned.ranks[0].kv_cache
        )
        params = SamplingParams(max_tokens=7, temperature=0, ignore_eos=True)
        llm.generate([[5, 6, 7, 8]], params, use_tqdm=False)
        # A prompt of four tokens and six decodes, a draw each.
        assert runner.plan.exchanges is not None
        expected = step_bytes(runner.plan.exchanges.exchanges, 4 + 6, 7)
        assert {kind: count for kind, count in runner.place.group.num_bytes.items() if count} == expected
    finally:
        llm.core.close()


def test_private_bytes_grow_with_what_is_written() -> None:
    before = private_bytes()
    # No allocator's: that may have kept what another test gave back.
    size = 64 * 2**20
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
        kept.write(b"1" * size)
        assert 0.9 * size < private_bytes() - before < 1.2 * size
