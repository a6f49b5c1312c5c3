"""What config.json says of each module, and what the files hold, as specifications."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError
from engine.loading.formats import stored_scheme
from engine.loading.safetensors import DirectoryCheckpoint
from engine.quant.weight import GridWeight
from engine.quant_spec import parse_scheme_spec
from tests.helpers.quantized_directory import write_directory

DOWN, UP, QUERY = (
    "model.layers.1.mlp.down_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.11.self_attn.q_proj",
)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def group(bits: int, targets: list[str], **weights: Any) -> dict[str, Any]:
    size = weights.get("group_size")
    strategy = "channel" if size is None else "group"
    return {"targets": targets, "weights": {"num_bits": bits, "strategy": strategy, **weights}}


def compressed(*groups: dict[str, Any], ignore: list[str] | None = None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ["lm_head"] if ignore is None else ignore,
    }


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, **changes}


def awq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 64, **changes}


def four_bits(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **changes}


EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (
            compressed(group(4, ["Linear"], group_size=128)),
            {DOWN: "int4:g128", HEAD: "none", EMBEDDING: "none"},
        ),
        (compressed(group(4, ["Linear"])), {DOWN: "int4:g0"}),
        (compressed(group(8, ["Linear"]), ignore=[]), {DOWN: "int8", HEAD: "int8"}),
        (compressed(group(8, ["Linear"], group_size=32)), {DOWN: "int8:g32"}),
        (compressed(group(8, ["Linear"], strategy="tensor")), {DOWN: "int8"}),
        (compressed(group(8, ["Linear"], symmetric=False)), {DOWN: "none"}),
        (compressed(group(4, ["Linear"], group_size=128, symmetric=False)), {DOWN: "int4:g128"}),
        (compressed(group(4, ["Linear"], group_size=48)), {DOWN: "none"}),
        (compressed(group(4, ["Linear"], group_size=128, actorder="group")), {DOWN: "none"}),
        (compressed(group(4, ["Linear"], group_size=128, actorder="static")), {DOWN: "int4:g128"}),
        (
            compressed(
                group(4, ["Linear"], group_size=64),
                group(8, ["re:.*down_proj$"]),
                ignore=["re:.*self_attn.*", "lm_head"],
            ),
            {DOWN: "int8", UP: "int4:g64", QUERY: "none", HEAD: "none"},
        ),
        (
            compressed(group(4, [DOWN, QUERY], group_size=32)),
            {DOWN: "int4:g32", QUERY: "int4:g32", UP: "none"},
        ),
        (compressed({"targets": ["Linear"], "weights": None}), {DOWN: "none"}),
        (gptq(), {DOWN: "int4:g128", QUERY: "int4:g128", HEAD: "none", EMBEDDING: "none"}),
        (gptq(group_size=-1, lm_head=True), {DOWN: "int4:g0", HEAD: "int4:g0", EMBEDDING: "none"}),
        (gptq(bits=8), {DOWN: "int8:g128"}),
        (gptq(bits=8, group_size=-1), {DOWN: "int8"}),
        (gptq(bits=8, sym=False), {DOWN: "none"}),
        (gptq(sym=False), {DOWN: "int4:g128"}),
        (gptq(desc_act=True), {DOWN: "none"}),
        (gptq(desc_act=True, static_groups=True), {DOWN: "int4:g128"}),
        (gptq(desc_act=True, group_size=-1), {DOWN: "int4:g0"}),
        (
            gptq(
                dynamic={
                    r"-:model\.layers\.1\.": {},
                    r"+:.*q_proj": {"bits": 8, "group_size": -1},
                    r".*up": {"group_size": 32},
                    r".*": {"bits": 8},
                }
            ),
            {DOWN: "none", QUERY: "int8", UP: "int4:g32", "model.layers.2.mlp.gate_proj": "int8:g128"},
        ),
        (gptq(dynamic={".*up": {"desc_act": True}}), {UP: "none", DOWN: "int4:g128"}),
        (
            gptq(modules_in_block_to_quantize=[["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]),
            {QUERY: "int4:g128", UP: "int4:g128", DOWN: "none"},
        ),
        (gptq(modules_in_block_to_quantize=["mlp.up_proj"]), {UP: "int4:g128", DOWN: "none"}),
        (gptq(modules_to_not_convert=["mlp"]), {UP: "none", QUERY: "int4:g128"}),
        (awq(), {DOWN: "int4:g64", HEAD: "none", EMBEDDING: "none"}),
        (awq(group_size=-1), {DOWN: "int4:g0"}),
        # Parts of names are whole: layers.1 is not layers.11.
        (
            awq(modules_to_not_convert=["layers.1", "up_proj", "gate"]),
            {DOWN: "none", UP: "none", QUERY: "int4:g64", "model.layers.0.mlp.gate_proj": "int4:g64"},
        ),
        (EIGHT_BITS, {DOWN: "int8", HEAD: "none", EMBEDDING: "none"}),
        ({**EIGHT_BITS, "llm_int8_skip_modules": ["q_proj"]}, {DOWN: "int8", QUERY: "none", HEAD: "int8"}),
        ({"load_in_8bit": True}, {DOWN: "int8"}),
        (four_bits(), {DOWN: "nf4", HEAD: "none", EMBEDDING: "none"}),
        (four_bits(bnb_4bit_quant_type="fp4"), {DOWN: "none"}),
        (
            {"quant_method": "llm-engine", "specification": "int4:g64,*.down_proj=int8"},
            {DOWN: "int8", UP: "int4:g64", HEAD: "int8:g32"},
        ),
    ],
)
def test_what_config_json_says(quantization: dict[str, Any], expected: dict[str, str]) -> None:
    config = {"quantization_config": quantization}
    found = {module: stored_scheme(config, module) for module in expected}
    assert found == expected
    for text in expected.values():
        assert str(parse_scheme_spec(text)) == text


def test_without_quantization() -> None:
    assert stored_scheme({}, DOWN) is None
    assert stored_scheme({"quantization_config": None}, DOWN) is None


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "fp6"}, ["'fp6'", "compressed-tensors"]),
        (gptq(bits=3), ["bits", "3", "4, 8"]),
        (gptq(desc_act="yes"), ["desc_act", "yes"]),
        (gptq(modules_in_block_to_quantize=[[1]]), ["modules_in_block_to_quantize", "strings"]),
        (four_bits(bnb_4bit_quant_type="int4"), ["bnb_4bit_quant_type", "int4", "nf4"]),
        (awq(modules_to_not_convert="lm_head"), ["modules_to_not_convert", "list of strings"]),
        (compressed(group(4, ["Linear"], type="float")), ["group_0.weights.type", "float"]),
    ],
)
def test_unsupported_settings_are_refused(quantization: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        stored_scheme({"quantization_config": quantization}, DOWN)
    assert all(word in str(caught.value) for word in ["config.json", *words])


def awq_module(name: str) -> dict[str, torch.Tensor]:
    return {
        f"{name}.qweight": torch.zeros(64, 8, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(1, 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(1, 64).half(),
    }


def gptq_module(name: str, group_index: list[int]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.qweight": torch.zeros(8, 64, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(2, 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(2, 64).half(),
        f"{name}.g_idx": torch.tensor(group_index, dtype=torch.int32),
    }


def test_files_know_better(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A module that holds floats, though config.json says nothing of it."""
    caplog.set_level(logging.WARNING)
    tensors = {**awq_module(UP), f"{DOWN}.weight": torch.ones(64, 64)}
    checkpoint = write_directory(tmp_path, tensors, awq())
    assert isinstance(checkpoint, DirectoryCheckpoint)
    assert checkpoint.stored_scheme(UP) == "int4:g64"
    assert checkpoint.stored_scheme(DOWN) == "none"
    assert not caplog.records
    floats = write_directory(tmp_path, {f"{DOWN}.weight": torch.ones(64, 64)}, None)
    assert isinstance(floats, DirectoryCheckpoint)
    assert floats.stored_scheme(DOWN) is None


def test_names_behind_a_multimodal_wrapper(tmp_path: Path) -> None:
    """config.json names the wrapper's modules, and the engine those of the text model."""
    inner = UP.replace("model.", "model.language_model.", 1)
    quantization = gptq(group_size=32, dynamic={r"model\.language_model\.layers\.0": {"group_size": 64}})
    tensors = gptq_module(inner, [0] * 64)
    checkpoint = write_directory(tmp_path, tensors, quantization, text_config={"model_type": "llama"})
    assert isinstance(checkpoint, DirectoryCheckpoint)
    assert checkpoint.stored_scheme(UP) == "int4:g64"


def test_one_line_says_which_weights_become_floats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    in_order, mixed = [k // 32 for k in range(64)], [k % 2 for k in range(64)]
    tensors = {**gptq_module(DOWN, mixed), **gptq_module(UP, mixed), **gptq_module(QUERY, in_order)}
    quantization = gptq(group_size=32, desc_act=True, dynamic={".*q_proj": {"desc_act": False}})
    checkpoint = write_directory(tmp_path, tensors, quantization)
    assert isinstance(checkpoint, DirectoryCheckpoint)
    for module in (DOWN, UP, QUERY):
        is_kept = isinstance(checkpoint.tensor(f"{module}.weight"), GridWeight)
        assert checkpoint.stored_scheme(module) == ("int4:g32" if is_kept else "none")
        assert is_kept == (module == QUERY)
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    assert all(word in message for word in [str(tmp_path), "2 of 3", UP, "floats", "--quant", "int8:g32"])
