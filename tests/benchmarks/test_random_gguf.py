"""A file of random weights: every engine that reads GGUF can load it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.random_gguf import main
from engine import LLM, SamplingParams
from engine.loading.resolve import resolve_model
from engine.tokenizer.tokenizer import load_tokenizer


def test_a_random_model_generates(tmp_path: Path) -> None:
    file = tmp_path / "random.gguf"
    shape = "--layers 2 --hidden-size 64 --intermediate-size 96 --heads 4 --kv-heads 2 --context 64"
    assert main([str(file), *shape.split()]) == 0
    text = "The capital of France"
    assert load_tokenizer(file).encode(text) == load_tokenizer(resolve_model("llama")).encode(text)
    llm = LLM(model=str(file), quant="none")
    config = llm.core.model.runner.model.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (2, 64, 96)
    assert (config.num_heads, config.num_kv_heads, config.max_position_embeddings) == (4, 2, 64)
    [result] = llm.generate(text, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert len(result.outputs[0].token_ids) == 8


def test_a_shape_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "x.gguf"), "--heads", "9", "--kv-heads", "2"]) == 2
    assert "num_key_value_heads" in capsys.readouterr().err
