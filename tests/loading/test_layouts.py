"""Files as real tools write them: loaded as floats, they give transformers' log-probabilities.

transformers writes every family in its number types, sharded or pickled; the gguf package writes its types, of which
it dequantizes the reference itself.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.helpers.gguf_file import write_gguf_model
from tests.helpers.log_probabilities import assert_same_log_probabilities
from tests.helpers.tiny import TINY_CONFIGS, load_reference, randomize, write_checkpoint

FAMILIES = ("llama", "llama-biases", "smollm2", "mistral", "qwen2", "qwen3", "gemma3")
LAYOUTS = ("float32", "float16", "bfloat16", "sharded", "pickled")
KINDS = (
    Type.F32,
    Type.F16,
    Type.BF16,
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_0,
    Type.Q5_1,
    Type.Q8_0,
    Type.TQ1_0,
    Type.TQ2_0,
)
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
"""Rows of whole blocks of 256."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes(family: str, layout: str, tmp_path: Path) -> None:
    if layout in ("float16", "sharded", "pickled") and family not in ("llama", "gemma3"):
        pytest.skip("the family has no part in that")
    model = AutoModelForCausalLM.from_config(deepcopy(TINY_CONFIGS[family]), dtype=torch.float32)
    randomize(model, seed=0)
    path = tmp_path / "model"
    if layout in ("float16", "bfloat16"):
        model = model.to(getattr(torch, layout))
    model.save_pretrained(path, max_shard_size="40KB" if layout == "sharded" else "1GB")
    if layout == "pickled":
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    # Read again: a model that was of half the width keeps the rounded frequencies of its rope.
    assert_same_log_probabilities(path, load_reference(path))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("ties", [False, True])
def test_what_the_gguf_package_writes(kind: Type, ties: bool, tmp_path: Path) -> None:
    config = deepcopy(TINY_CONFIGS["llama"])
    for name, value in {**WIDE, "tie_word_embeddings": ties}.items():
        setattr(config, name, value)
    path = tmp_path / "model.gguf"
    reference = write_gguf_model(path, config, kind)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 2:
                stored = quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(dequantize(stored, kind)))
    assert_same_log_probabilities(path, reference.eval())


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_writes(kind: str, is_nested: bool, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = deepcopy(TINY_CONFIGS["llama"])
    config.intermediate_size = 128
    write_checkpoint(tmp_path / "floats", config)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=is_nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "floats", quantization_config=settings, dtype=torch.float32, attn_implementation="eager"
    )
    model.save_pretrained(tmp_path / "model")
    # Multiplied in floats: its own product takes bfloat16 where the processor has it, whatever type is asked for.
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "floats", dtype=torch.float32, attn_implementation="eager"
    )
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            reference.get_submodule(name).weight.data.copy_(weight)
    assert_same_log_probabilities(tmp_path / "model", reference.eval())
