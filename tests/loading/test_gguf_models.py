"""The two packaged models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import ModelNotFoundError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.quant.block_weight import BlockWeight
from engine.quant.weight import GridWeight, to_float


@pytest.fixture(params=["llama", "gemma"])
def path(request: pytest.FixtureRequest) -> Path:
    alias: str = request.param
    if alias == "llama":
        return resolve_model(alias)
    try:
        return resolve_model(alias)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


def test_smollm2_is_as_published() -> None:
    checkpoint = open_checkpoint(resolve_model("llama"))
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert {key: checkpoint.config[key] for key in published} == published
    weights = [checkpoint.tensor(name) for name in checkpoint.names()]
    assert sum(isinstance(weight, BlockWeight) and weight.kind == "q4_1" for weight in weights) == 210
    assert [weight.codes.shape for weight in weights if isinstance(weight, GridWeight)] == [(49152, 576)]


def test_every_tensor_has_the_shape_that_the_config_says(path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert {name: checkpoint.tensor(name).shape for name in checkpoint.names()} == expected


@pytest.mark.slow
def test_every_tensor_equals_the_one_that_transformers_reads(path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config))
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert checkpoint.names() == set(expected)
    for name in checkpoint.names():
        assert torch.equal(to_float(checkpoint.tensor(name)), torch.as_tensor(expected[name])), name
