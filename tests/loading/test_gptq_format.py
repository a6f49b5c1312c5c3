"""GPTQ directories, against words written down and against packing element by element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.loading.checkpoint import open_checkpoint
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline
from engine.quant.plan import QuantizationPlan
from engine.quant.weight import GridWeight, to_float
from engine.quant_spec import parse_quant_spec
from tests.helpers.quantized_directory import (
    MODULE,
    assert_refused,
    expected_weight,
    pack_rows,
    random_codes,
    random_scales,
    read_module,
    to_tensor,
    transpose,
    write_directory,
)
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

ROWS, COLUMNS = 24, 64


def settings(bits: int = 4, group_size: int = 16, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, **changes}


def store(
    codes: list[list[int]], zeros: list[list[int]], scales: torch.Tensor, bits: int, is_v2: bool = False
) -> dict[str, torch.Tensor]:
    """Codes [N][K], zeros [N][G] and scales [N, G] as GPTQ stores them, without a group index."""
    ones = 0 if is_v2 else sum(1 << shift for shift in range(0, 32, bits))
    zero_words = pack_rows(transpose(zeros), bits)
    return {
        "qweight": to_tensor(transpose(pack_rows(codes, bits))),
        "qzeros": to_tensor([[(word - ones) % (1 << 32) for word in row] for row in zero_words]),
        "scales": scales.t(),
    }


def index(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_words_written_down(tmp_path: Path) -> None:
    """Eight rows of eight columns in one group: word n is row n, its lowest digit column 0."""
    words = [0x76543210, 0xFEDCBA98, *[0x11111111 * row for row in range(2, 8)]]
    parts = {
        "qweight": to_tensor([words]),
        # Zeros of 1 to 8, row 0 in the lowest digit.
        "qzeros": to_tensor([[0x76543210]]),
        "scales": torch.tensor([[0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25]]).half(),
        "g_idx": index([0] * 8),
    }
    weight = read_module(tmp_path, parts, settings(group_size=8))
    assert isinstance(weight, GridWeight)
    assert weight.codes[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert weight.codes[1].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert weight.dequantize()[0].tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert weight.dequantize()[1].tolist() == [12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0, 26.0]
    assert weight.dequantize()[2:7].tolist() == [[-1.0] * 8] * 5
    assert weight.dequantize()[7].tolist() == [-0.25] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("group_size", [16, 64, -1, 48])
def test_four_bits_are_a_grid(tmp_path: Path, group_size: int, is_v2: bool, dtype: torch.dtype) -> None:
    size = COLUMNS if group_size == -1 else group_size
    groups = -(-COLUMNS // size)
    codes, zeros = random_codes(ROWS, COLUMNS, 4, seed=1), random_codes(ROWS, groups, 4, seed=2)
    zeros[3][0] = 0  # borrows from the next row's in version 1
    scales = random_scales(ROWS, groups, dtype)
    parts = store(codes, zeros, scales, 4, is_v2)
    parts["g_idx"] = index([k // size for k in range(COLUMNS)])
    changes = {"checkpoint_format": "gptq_v2"} if is_v2 else {}
    weight = read_module(tmp_path, parts, settings(group_size=group_size, **changes))
    assert isinstance(weight, GridWeight)
    assert weight.codes.dtype == torch.uint8
    assert weight.codes.tolist() == codes
    assert weight.group_size == size
    assert weight.scale.dtype == (torch.float16 if dtype == torch.float16 else torch.float32)
    assert weight.minimum is not None
    assert weight.minimum.dtype == torch.float32
    expected = expected_weight(codes, zeros, scales, lambda k: k // size)
    if dtype == torch.float32:
        # Two products of 24 bits and a sum, each rounded: half an ulp of 15 scales three times.
        assert torch.all((weight.dequantize() - expected).abs() <= 15 * 0.0101 * 3 * 2**-24)
    else:
        # Scales of 11 bits times 5: float32 holds every product and sum.
        assert torch.equal(weight.dequantize().double(), expected)


def test_group_index_may_be_missing(tmp_path: Path) -> None:
    codes, zeros = random_codes(ROWS, COLUMNS, 4, seed=1), random_codes(ROWS, 4, 4, seed=2)
    scales = random_scales(ROWS, 4)
    weight = read_module(tmp_path, store(codes, zeros, scales, 4), settings())
    assert isinstance(weight, GridWeight)
    assert torch.equal(weight.dequantize().double(), expected_weight(codes, zeros, scales, lambda k: k // 16))


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_in_the_order_of_activations_are_floats(tmp_path: Path, bits: int) -> None:
    codes, zeros = random_codes(ROWS, COLUMNS, bits, seed=1), random_codes(ROWS, 4, bits, seed=2)
    scales = random_scales(ROWS, 4)
    group_index = [(k * 5 + 3) % 64 // 16 for k in range(COLUMNS)]  # 16 columns in each group
    parts = {**store(codes, zeros, scales, bits), "g_idx": index(group_index)}
    weight = read_module(tmp_path, parts, settings(bits, desc_act=True))
    assert isinstance(weight, torch.Tensor)
    assert weight.dtype == torch.float32
    # Differences of 8 bits times scales of 11 bits are exact.
    assert torch.equal(weight.double(), expected_weight(codes, zeros, scales, lambda k: group_index[k]))


@pytest.mark.parametrize("is_v2", [False, True])
def test_symmetric_eight_bits_are_a_grid(tmp_path: Path, is_v2: bool) -> None:
    codes = random_codes(ROWS, COLUMNS, 8, seed=1)
    scales = random_scales(ROWS, 4)
    zeros = [[128] * 4] * ROWS
    changes = {"format": "gptq_v2"} if is_v2 else {"format": "gptq"}
    weight = read_module(tmp_path, store(codes, zeros, scales, 8, is_v2), settings(8, **changes))
    assert isinstance(weight, GridWeight)
    assert weight.minimum is None
    assert weight.codes.dtype == torch.int8
    assert weight.codes.tolist() == [[code - 128 for code in row] for row in codes]
    assert torch.equal(weight.dequantize().double(), expected_weight(codes, zeros, scales, lambda k: k // 16))


def test_asymmetric_eight_bits_are_floats(tmp_path: Path) -> None:
    codes, zeros = random_codes(ROWS, COLUMNS, 8, seed=1), random_codes(ROWS, 4, 8, seed=2)
    scales = random_scales(ROWS, 4)
    weight = read_module(tmp_path, store(codes, zeros, scales, 8), settings(8))
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight.double(), expected_weight(codes, zeros, scales, lambda k: k // 16))


def test_modules_with_numbers_of_their_own(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: the first pattern that a name begins with counts."""
    codes8, codes4 = random_codes(ROWS, COLUMNS, 8, seed=1), random_codes(ROWS, COLUMNS, 4, seed=1)
    scales, narrow = random_scales(ROWS, 4), random_scales(ROWS, 2)
    tensors = {}
    for name, parts in {
        "model.layers.0.mlp.up_proj": store(codes8, [[128] * 4] * ROWS, scales, 8),
        "model.layers.1.mlp.up_proj": store(codes4, [[8] * 2] * ROWS, narrow, 4),
        "model.layers.2.mlp.up_proj": store(codes4, [[8] * 4] * ROWS, scales, 4),
    }.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    dynamic = {
        r"-:model\.layers\.0\.self_attn": {},
        r"+:model\.layers\.0\.": {"bits": 8},
        r"model\.layers\.[01]\.": {"group_size": 32},
        r"layers\.2": {"bits": 8},  # not at the beginning of any name
    }
    checkpoint = write_directory(tmp_path, tensors, settings(dynamic=dynamic))
    weights = [checkpoint.tensor(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(3)]
    assert all(isinstance(weight, GridWeight) for weight in weights)
    assert [weight.codes.dtype for weight in weights if isinstance(weight, GridWeight)] == [
        torch.int8,
        torch.uint8,
        torch.uint8,
    ]
    assert [weight.group_size for weight in weights if isinstance(weight, GridWeight)] == [16, 32, 16]


def quantize_linears(path: Path, target: Path, **layout: Any) -> None:
    """Rounds a float directory's linear layers, lm_head too, to symmetric GPTQ in groups of 16.

    Leaves the rounded weights in `path`, as floats.
    """
    tensors = load_file(path / "model.safetensors")
    floats, quantized = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or "embed" in name:
            floats[name] = quantized[name] = tensor
            continue
        groups = tensor.view(tensor.shape[0], -1, 16)
        scale = (groups.abs().amax(dim=2) / 7).half()
        codes = (groups / scale[:, :, None]).round().clamp(-8, 7).int().view(tensor.shape) + 8
        zeros = [[8] * scale.shape[1]] * scale.shape[0]
        for part, stored in store(codes.tolist(), zeros, scale, 4).items():
            quantized[f"{name.removesuffix('weight')}{part}"] = stored.contiguous()
        floats[name] = (codes - 8) * scale.float().repeat_interleave(16, dim=1)
    save_file(floats, path / "model.safetensors")
    target.mkdir()
    config = json.loads((path / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings(**layout)}))
    halves = [dict(list(quantized.items())[half::2]) for half in range(2)]
    weight_map = {}
    for number, half in enumerate(halves):
        save_file(half, target / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(half, f"model-{number}.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("family", ["llama-biases", "gemma3"])
def test_a_model_is_that_of_its_rounded_weights(tmp_path: Path, family: str) -> None:
    """Sharded, so that a weight's parts lie in different files."""
    write_checkpoint(tmp_path / "float", TINY_CONFIGS[family])
    quantize_linears(tmp_path / "float", tmp_path / "gptq")
    checkpoints = [open_checkpoint(tmp_path / name) for name in ("float", "gptq")]
    assert checkpoints[0].names() == checkpoints[1].names()
    states = []
    for checkpoint in checkpoints:
        model = Decoder(
            ModelConfig.from_dict(checkpoint.config),
            QuantizationPlan(parse_quant_spec("none"), torch.float32),
            torch.float32,
            TensorGroup(),
            Pipeline(),
        )
        model.load(lambda name, part, checkpoint=checkpoint: checkpoint.tensor(name))
        states.append(model.state_dict())
    assert checkpoints[0].config["tie_word_embeddings"] == checkpoints[1].config["tie_word_embeddings"]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_names_and_floats(tmp_path: Path) -> None:
    codes = random_codes(ROWS, COLUMNS, 4, seed=1)
    parts = store(codes, [[8] * 4] * ROWS, random_scales(ROWS, 4), 4)
    norm, bias = torch.rand(8), torch.rand(ROWS).half()
    tensors = {f"lm_head.{part}": tensor for part, tensor in parts.items()}
    checkpoint = write_directory(
        tmp_path, {**tensors, "lm_head.bias": bias, "model.norm.weight": norm}, settings()
    )
    assert checkpoint.names() == {"lm_head.weight", "lm_head.bias", "model.norm.weight"}
    assert checkpoint.config["tie_word_embeddings"] is False
    assert to_float(checkpoint.tensor("lm_head.weight")).shape == (ROWS, COLUMNS)
    for name, tensor in (("lm_head.bias", bias), ("model.norm.weight", norm)):
        stored = checkpoint.tensor(name)
        assert isinstance(stored, torch.Tensor)
        assert torch.equal(stored, tensor)
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias"):
        checkpoint.tensor("model.norm.bias")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, ["bits", "3", "4, 8"]),
        ({"bits": None}, ["bits"]),
        ({"bits": 4.0}, ["bits", "4.0"]),
        ({"group_size": 0}, ["group_size", "0"]),
        ({"group_size": "16"}, ["group_size", "'16'"]),
        ({"checkpoint_format": "marlin"}, ["checkpoint_format", "marlin"]),
        ({"format": "bitblas"}, ["format", "bitblas"]),
        ({"is_marlin_format": True}, ["is_marlin_format"]),
        ({"dynamic": []}, ["dynamic", "object"]),
        ({"dynamic": {"(": {}}}, ["dynamic", "regular expression"]),
        ({"dynamic": {"a": {"bits": 2}}}, ["dynamic.a.bits", "2"]),
        ({"quant_method": None}, ["None", "gptq"]),
    ],
)
def test_unsupported_settings_are_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    quantization = settings(**changes)
    assert_refused(
        lambda: write_directory(tmp_path, {"model.norm.weight": torch.ones(2)}, quantization),
        "config.json",
        *words,
    )


def test_settings_must_be_an_object(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(2)}
    assert_refused(
        lambda: write_directory(tmp_path, tensors, "gptq"), "config.json", "quantization_config", "'gptq'"
    )
    assert write_directory(tmp_path, tensors, None).names() == {"model.norm.weight"}


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("qweight", None, ["missing"]),
        ("qzeros", None, ["missing"]),
        ("scales", None, ["missing"]),
        ("qweight", lambda tensor: tensor.long(), ["int32", "int64"]),
        ("qweight", lambda tensor: tensor[:0], ["elements"]),
        ("qweight", lambda tensor: tensor[0], ["[any, any]", f"[{ROWS}]"]),
        ("scales", lambda tensor: tensor.int(), ["float16", "int32"]),
        ("scales", lambda tensor: tensor[:3], [f"[4, {ROWS}]", f"[3, {ROWS}]"]),
        ("scales", lambda tensor: tensor[:, 1:], [f"[4, {ROWS}]", f"[4, {ROWS - 1}]"]),
        ("qzeros", lambda tensor: tensor[:, 1:], ["[4, 3]", "[4, 2]"]),
        ("g_idx", lambda tensor: tensor[1:], ["[64]", "[63]"]),
        ("g_idx", lambda tensor: tensor + 1, ["groups of 0 to 3", "1 to 4"]),
        ("g_idx", lambda tensor: tensor - 1, ["groups of 0 to 3", "-1 to 2"]),
        ("g_idx", lambda tensor: tensor.float(), ["int32", "float32"]),
    ],
)
def test_damaged_tensors_are_named(tmp_path: Path, part: str, change: Any, words: list[str]) -> None:
    codes = random_codes(ROWS, COLUMNS, 4, seed=1)
    parts = store(codes, [[8] * 4] * ROWS, random_scales(ROWS, 4), 4)
    parts["g_idx"] = index([k // 16 for k in range(COLUMNS)])
    if change is None:
        del parts[part]
    else:
        parts[part] = change(parts[part])
    assert_refused(
        lambda: read_module(tmp_path, parts, settings()), f"{MODULE}.{part}", str(tmp_path), *words
    )


def auto_round(**changes: Any) -> dict[str, Any]:
    packing = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    return {**packing, "bits": 4, "group_size": 16, "sym": True, **changes}


def test_auto_round_packs_as_gptq_does(tmp_path: Path) -> None:
    codes, zeros = random_codes(ROWS, COLUMNS, 4, seed=1), [[8] * 4 for _ in range(ROWS)]
    scales = random_scales(ROWS, 4)
    weight = read_module(tmp_path, store(codes, zeros, scales, 4), auto_round())
    assert isinstance(weight, GridWeight)
    assert torch.equal(weight.dequantize().double(), expected_weight(codes, zeros, scales, lambda k: k // 16))


def test_auto_round_modules_of_their_own(tmp_path: Path) -> None:
    codes, zeros = random_codes(ROWS, COLUMNS, 8, seed=1), [[128] * 2 for _ in range(ROWS)]
    scales = random_scales(ROWS, 2)
    extra = {MODULE: {"bits": 8, "group_size": 32}, "lm_head": {"bits": 16}}
    parts = {f"{MODULE}.{part}": tensor for part, tensor in store(codes, zeros, scales, 8).items()}
    checkpoint = write_directory(
        tmp_path, {**parts, "lm_head.weight": torch.ones(4, 4)}, auto_round(extra_config=extra)
    )
    weight = to_float(checkpoint.tensor(f"{MODULE}.weight"))
    assert torch.equal(weight.double(), expected_weight(codes, zeros, scales, lambda k: k // 32))
    found = {name: str(words) for name, words in checkpoint.auto_schemes([MODULE, "lm_head"]).items()}
    assert found == {MODULE: "int8:g32"}


def test_auto_rounds_other_packings_are_refused(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(2)}
    for packing in ("auto_round:auto_awq", "auto_round:exllamav2", None):
        assert_refused(
            lambda packing=packing: write_directory(tmp_path, tensors, auto_round(packing_format=packing)),
            "packing_format",
            "auto_round:auto_gptq",
        )
