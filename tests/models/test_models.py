"""The model code against transformers: tiny random checkpoints of every family, logit by logit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.core.batch import Batch, BatchRow
from engine.loading.checkpoint import open_checkpoint
from engine.models.config import ModelConfig, RopeConfig
from engine.models.rope import rotary_frequencies
from tests.helpers.paged import BLOCK_SIZE, CHUNKS, DRAW, make_runner, make_sequences, run_chunks
from tests.helpers.tiny import (
    ORIGINAL_LENGTH,
    SLIDING_WINDOW,
    TINY_CONFIGS,
    load_reference,
    reference_logits,
    write_checkpoint,
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for name, config in TINY_CONFIGS.items():
        write_checkpoint(root / name, config)
    return {name: root / name for name in TINY_CONFIGS}


@pytest.mark.parametrize("bodies", ["c", "torch"])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_prefill_chunked_prefill_and_decode_agree_with_transformers(
    checkpoints: dict[str, Path], name: str, bodies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bodies == "torch":
        monkeypatch.setattr("engine.kernels.cpu.library", lambda: None)
    reference = load_reference(checkpoints[name])
    runner = make_runner(checkpoints[name])
    sequences = make_sequences(runner.model_config.vocab_size)
    assert CHUNKS[0][0] > max(SLIDING_WINDOW, ORIGINAL_LENGTH)
    for sequence, computed in zip(sequences, run_chunks(runner, sequences), strict=True):
        expected = reference_logits(reference, sequence)
        assert expected.std() > 0.5, "the checkpoint is too flat to show differences"
        for position, logits in computed.items():
            torch.testing.assert_close(logits, expected[position], atol=1e-4, rtol=0)


def test_tokens_that_are_stored_already_are_not_written_again(checkpoints: dict[str, Path]) -> None:
    runner = make_runner(checkpoints["qwen3"])
    tokens = make_sequences(320)[0][: 2 * BLOCK_SIZE]
    runner.execute(Batch([BatchRow(tokens, 0, 0, [3, 2], None)]))
    stored = runner.cache.data[:, :, [3, 2]].clone()
    logits = runner.execute(Batch([BatchRow(tokens, 0, 0, [5, 4], DRAW)])).clone()
    # Another token at the place of the last one would change its key, were that written.
    runner.execute(Batch([BatchRow([tokens[-1] ^ 1], len(tokens) - 1, len(tokens), [3, 2], DRAW)]))
    assert torch.equal(runner.cache.data[:, :, [3, 2]], stored)
    again = runner.execute(Batch([BatchRow(tokens[-1:], len(tokens) - 1, len(tokens), [3, 2], DRAW)]))
    torch.testing.assert_close(again, logits)


def _old_spelling(config: PreTrainedConfig) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    old = config.to_dict()
    rope = old.pop("rope_parameters")
    layer_types = old.pop("layer_types", None)
    if config.model_type == "gemma3_text":
        assert layer_types == TINY_CONFIGS["gemma3"].layer_types
        old["sliding_window_pattern"] = 3
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old["torch_dtype"] = old.pop("dtype", None)
    return old


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_the_spellings_of_transformers_4_and_5_mean_the_same(name: str) -> None:
    new = TINY_CONFIGS[name].to_dict()
    assert "rope_parameters" in new
    assert ModelConfig.from_dict(_old_spelling(TINY_CONFIGS[name])) == ModelConfig.from_dict(new)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.9, "mscale_all_dim": 0.7},
        {"rope_type": "yarn", "factor": 32.0, "truncate": False},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_rotary_frequencies_agree_with_transformers(scaling: dict[str, Any]) -> None:
    parameters = {**scaling, "rope_theta": 150000.0, "original_max_position_embeddings": 4096}
    config = AutoConfig.for_model(
        "llama", head_dim=64, max_position_embeddings=131072, rope_parameters=parameters
    )
    expected, expected_magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    rope = RopeConfig(150000.0, tuple(parameters.items()))
    frequencies, magnitude = rotary_frequencies(rope, head_dim=64)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert magnitude == pytest.approx(expected_magnitude)


def test_pytorch_model_bin_gives_the_same_logits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    reference = load_reference(checkpoints["llama-biases"])
    reference.config.save_pretrained(tmp_path)
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_logits(checkpoints["llama-biases"], tmp_path)


def test_a_tied_head_is_the_embedding(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    reference = load_reference(checkpoints["smollm2"])
    untied = load_reference(checkpoints["smollm2"])
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(reference.get_input_embeddings().weight.detach().clone())
    untied.save_pretrained(tmp_path)
    assert "lm_head.weight" in open_checkpoint(tmp_path).names()
    assert "lm_head.weight" not in open_checkpoint(checkpoints["smollm2"]).names()
    assert_same_logits(checkpoints["smollm2"], tmp_path)


def assert_same_logits(one: Path, other: Path) -> None:
    sequences = make_sequences(320)
    for expected, actual in zip(
        run_chunks(make_runner(one), sequences), run_chunks(make_runner(other), sequences), strict=True
    ):
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[position], actual[position]) for position in expected)


@pytest.mark.parametrize(
    # Spread by a Hadamard matrix, keys as random as these lose what they did, but other bits of it.
    ("cache_type", "bound"),
    [("bfloat16", 0.02), ("int8", 0.035), ("int4", 0.4), ("fp8_e4m3", 0.15)],
)
def test_a_smaller_cache_costs_little(checkpoints: dict[str, Path], cache_type: str, bound: float) -> None:
    exact, rounded = (
        run_chunks(runner, make_sequences(320))
        for runner in (
            make_runner(checkpoints["llama"], kv_cache_dtype=name) for name in ("float32", cache_type)
        )
    )
    for expected, computed in zip(exact, rounded, strict=True):
        a, b = (torch.stack(list(logits.values())) for logits in (computed, expected))
        assert 0 < float((a - b).norm() / b.norm()) < bound
