"""Model directories written by transformers and torch, read back tensor by tensor."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from engine.errors import CheckpointError
from engine.loading.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def assert_same_tensors(path: Path, expected: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.names() == set(expected)
    for name, tensor in expected.items():
        stored = checkpoint.tensor(name)
        assert isinstance(stored, torch.Tensor)
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored, tensor), name


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_safetensors(model: LlamaForCausalLM, tmp_path: Path, shard_size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    assert_same_tensors(tmp_path, model.state_dict())
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "eos_token_id" in checkpoint.generation_config


def write_torch_checkpoint(model: PreTrainedModel, path: Path, **options: Any) -> Path:
    model.config.save_pretrained(path)
    file = path / "pytorch_model.bin"
    torch.save(model.state_dict(), file, **options)
    return file


@pytest.mark.parametrize("is_zip", [True, False])
def test_pytorch_model_bin(model: LlamaForCausalLM, tmp_path: Path, is_zip: bool) -> None:
    write_torch_checkpoint(model, tmp_path, _use_new_zipfile_serialization=is_zip)
    assert_same_tensors(tmp_path, model.state_dict())
    assert open_checkpoint(tmp_path).generation_config == {}


def write_torch_shards(model: LlamaForCausalLM, path: Path) -> dict[str, str]:
    """A file for each tensor; the files by name."""
    model.config.save_pretrained(path)
    weight_map = {name: f"pytorch_model-{index:05}.bin" for index, name in enumerate(model.state_dict())}
    for name, tensor in model.state_dict().items():
        torch.save({name: tensor.clone()}, path / weight_map[name])
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_sharded_pytorch_model_bin(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_torch_shards(model, tmp_path)
    assert_same_tensors(tmp_path, model.state_dict())


def test_damaged_torch_files_are_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_torch_checkpoint(model, tmp_path)
    data = file.read_bytes()
    for length in (0, 100, len(data) // 2, len(data) - 10):
        file.write_bytes(data[:length])
        assert_refused(tmp_path, "pytorch_model.bin", "damaged or unreadable", "download it again")
    torch.save([1, 2], file)
    assert_refused(tmp_path, "pytorch_model.bin", "tensors by name")


def test_damaged_torch_shards_are_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """When they are read: a large model's are not opened before."""
    name = "model.norm.weight"
    weight_map = write_torch_shards(model, tmp_path)
    file = tmp_path / weight_map[name]
    whole, target = file.read_bytes(), tmp_path / "ran"
    torch.save({name: Harmful(target)}, file)
    harmful = file.read_bytes()
    for data in (whole[: len(whole) // 2], harmful):
        file.write_bytes(data)
        checkpoint = open_checkpoint(tmp_path)
        assert isinstance(checkpoint.tensor("lm_head.weight"), torch.Tensor)
        with pytest.raises(CheckpointError, match=weight_map[name]):
            checkpoint.tensor(name)
    assert not target.exists()
    torch.save({name: [1.0]}, file)
    with pytest.raises(CheckpointError, match=rf"{weight_map[name]}: '{name}' is not a tensor"):
        open_checkpoint(tmp_path).tensor(name)
    torch.save({}, file)
    with pytest.raises(CheckpointError, match=rf"{weight_map[name]}: tensor '{name}' is missing"):
        open_checkpoint(tmp_path).tensor(name)


def test_safetensors_are_preferred(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert_same_tensors(tmp_path, model.state_dict())


@pytest.mark.parametrize("nested_name", ["language_model.model.", "model.language_model."])
def test_multimodal_wrapper_becomes_its_text_model(tmp_path: Path, nested_name: str) -> None:
    """Both namings are about: the second since transformers 4.52."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 60, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    prefix = next(
        prefix
        for prefix in ("language_model.model.", "model.language_model.")
        if any(name.startswith(prefix) for name in stored)
    )
    save_file({name.replace(prefix, nested_name): tensor for name, tensor in stored.items()}, file)
    text_model = model.model.language_model
    expected = {f"model.{name}": tensor for name, tensor in text_model.state_dict().items()}
    assert_same_tensors(tmp_path, expected)
    config = open_checkpoint(tmp_path).config
    assert config["model_type"] == "gemma3_text"
    assert {key: config[key] for key in text} == text
    assert config["tie_word_embeddings"] is True
    assert "text_config" not in config


def test_gemma_config_that_leaves_out_defaults(tmp_path: Path) -> None:
    """The published 4B model names only what differs from transformers' defaults."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    outer = {"model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {"hidden_size": 1152}}
    (tmp_path / "config.json").write_text(json.dumps({**outer, "text_config": text}))
    save_file({"language_model.model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    config = open_checkpoint(tmp_path).config
    assert config["eos_token_id"] == [1, 106]
    complete = AutoConfig.for_model(**text)
    for key in (
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "query_pre_attn_scalar",
        "max_position_embeddings",
        "hidden_activation",
        "hidden_size",
        "sliding_window",
        "tie_word_embeddings",
    ):
        assert config[key] == getattr(complete, key), key
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (
        complete.rope_parameters["full_attention"]["rope_theta"],
        complete.rope_parameters["sliding_attention"]["rope_theta"],
    )


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    for word in words:
        assert word in str(caught.value)


def test_missing_tensor_and_shard_are_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias"):
        open_checkpoint(tmp_path).tensor("model.norm.bias")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.bias"] = index["weight_map"]["model.norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias"):
        open_checkpoint(tmp_path).tensor("model.norm.bias")
    shard = index["weight_map"]["model.norm.weight"]
    (tmp_path / shard).unlink()
    assert_refused(tmp_path, shard)


def test_incomplete_and_damaged_directories_are_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    assert_refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{")
    assert_refused(tmp_path, "config.json", "JSON")
    (tmp_path / "config.json").write_text("[]")
    assert_refused(tmp_path, "config.json", "object")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 100, len(data) // 2):
        file.write_bytes(data[:length])
        assert_refused(tmp_path, "model.safetensors")
    file.unlink()
    assert_refused(tmp_path, "no weights are there")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK not a zip")
    assert_refused(tmp_path, "pytorch_model.bin")


def test_quantized_weights_are_refused_by_name(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, "aqlm")


@pytest.mark.parametrize(
    "name",
    ["gptq_model-4bit-128g.safetensors", "consolidated.safetensors", "pytorch_model.pt", "weights.bin"],
)
def test_files_under_other_names(model: LlamaForCausalLM, tmp_path: Path, name: str) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name)
    # What training leaves beside them.
    save_file({"other": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    if not name.endswith(".pt"):
        assert_same_tensors(tmp_path, model.state_dict())
    assert_same_tensors(tmp_path / name, model.state_dict())


def test_files_that_share_the_tensors(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:4]}, tmp_path / "part-a.safetensors")
    save_file({name: tensors[name] for name in names[4:]}, tmp_path / "part-b.safetensors")
    assert_same_tensors(tmp_path, model.state_dict())
    save_file({name: tensors[name] for name in names[3:]}, tmp_path / "part-b.safetensors")
    assert_refused(tmp_path, "part-b.safetensors", names[3], "part-a.safetensors")


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("", "lm_head."),
        ("module.model.", "module.lm_head."),
        ("model.language_model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("_orig_mod.model.", "_orig_mod.lm_head."),
        ("model.text_model.", "lm_head."),
    ],
)
def test_words_before_the_names(model: LlamaForCausalLM, tmp_path: Path, prefix: str, head: str) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        prefix + name.removeprefix("model.")
        if name.startswith("model.")
        else head + name.removeprefix("lm_head."): tensor
        for name, tensor in tensors.items()
    }
    others = {"vision_tower.layers.0.mlp.up.weight": torch.ones(2)}
    save_file({**renamed, **others}, tmp_path / "model.safetensors")
    assert_same_tensors(tmp_path, model.state_dict())
    assert open_checkpoint(tmp_path).other_names() == set(others)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict"])
def test_weights_beside_the_state_of_training(model: LlamaForCausalLM, tmp_path: Path, key: str) -> None:
    file = write_torch_checkpoint(model, tmp_path)
    torch.save({key: model.state_dict(), "epoch": 3}, file)
    assert_same_tensors(tmp_path, model.state_dict())


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", 3])
def test_an_index_that_leaves_the_directory(model: LlamaForCausalLM, tmp_path: Path, file: object) -> None:
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))
    assert_refused(tmp_path / "model", "model.safetensors.index.json", "weight_map")


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_pickled_code_is_not_run(model: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_torch_checkpoint(model, tmp_path)
    target = tmp_path / "ran"
    torch.save({"model.norm.weight": Harmful(target)}, file)
    assert_refused(tmp_path, "pytorch_model.bin")
    file.write_bytes(pickle.dumps(Harmful(target), protocol=2))
    assert_refused(tmp_path, "pytorch_model.bin")
    assert not target.exists()
