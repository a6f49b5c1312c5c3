"""FP8 checkpoints of DeepSeek's, fbgemm's, ModelOpt's and compressed-tensors' layouts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.loading.checkpoint import Checkpoint, open_checkpoint, stored_schemes
from engine.loading.formats import stored_scheme
from tests.helpers.quantized_directory import MODULE, assert_refused, write_directory

ROWS, COLUMNS = 160, 192  # with a short last block either way


def codes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(ROWS, COLUMNS, generator=generator) * 100).to(torch.float8_e4m3fn)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5


def expected(scale: torch.Tensor) -> torch.Tensor:
    """Element by element, in Python's floats."""
    rows, columns = (*scale.shape, 1, 1)[:2] if scale.ndim else (1, 1)
    values = codes().float().tolist()
    places = scale.reshape(rows, columns).tolist()

    def place(index: int, size: int, count: int) -> int:
        return 0 if count == 1 else index if count == size else index // 128

    return torch.tensor(
        [
            [v * places[place(n, ROWS, rows)][place(k, COLUMNS, columns)] for k, v in enumerate(row)]
            for n, row in enumerate(values)
        ],
        dtype=torch.float64,
    )


def ct_settings(**weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }


LAYOUTS = {
    "deepseek": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_scale_inv", (2, 2)),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", ()),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "weight_scale", (ROWS, 1)),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", ()),
    "modelopt-channel": ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "weight_scale", (ROWS,)),
    "modelopt-block": ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "weight_scale", (2, 2)),
    "ct-tensor": (ct_settings(strategy="tensor"), "weight_scale", (1,)),
    "ct-channel": (ct_settings(strategy="channel"), "weight_scale", (ROWS, 1)),
    "ct-block": (ct_settings(strategy="block", block_structure=[128, 128]), "weight_scale", (2, 2)),
}


def write(path: Path, layout: str, **parts: torch.Tensor) -> Checkpoint:
    settings, part, shape = LAYOUTS[layout]
    tensors = {"weight": codes(), part: scales(*shape), **parts}
    return write_directory(path, {f"{MODULE}.{name}": tensor for name, tensor in tensors.items()}, settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values(layout: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, layout, input_scale=torch.tensor(1.0))
    assert checkpoint.names() == {f"{MODULE}.weight"}
    weight = checkpoint.tensor(f"{MODULE}.weight")
    assert isinstance(weight, torch.Tensor)
    torch.testing.assert_close(weight, expected(scales(*LAYOUTS[layout][2])).float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_as_int8_and_says_so(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        checkpoint = write(tmp_path, layout)
    (record,) = caplog.records
    assert "1 of 1 quantized matrices" in record.getMessage()
    assert "run as int8:g32" in record.getMessage()
    assert {module: str(words) for module, words in checkpoint.auto_schemes([MODULE]).items()} == {
        MODULE: "int8:g32"
    }
    # Whatever else is asked for is rounded anew: nothing is refused.
    assert stored_schemes(checkpoint, [MODULE]) == {}
    assert stored_scheme(checkpoint.config, MODULE) == "int8:g32"


def test_hf_quant_config(tmp_path: Path) -> None:
    """What ModelOpt writes beside a config.json that says nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    quantization = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head", "*.up_proj"],
    }
    settings = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    floats = torch.ones(4, 4)
    tensors = {f"{MODULE}.weight": codes(), f"{MODULE}.weight_scale": scales(), "lm_head.weight": floats}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    weight = checkpoint.tensor(f"{MODULE}.weight")
    assert isinstance(weight, torch.Tensor)
    torch.testing.assert_close(weight, expected(scales()).float(), rtol=2**-23, atol=0)
    modules = [MODULE, "lm_head", MODULE.replace("down", "up")]
    assert list(checkpoint.auto_schemes(modules)) == [MODULE]
    settings["quantization"] = {**quantization, "quant_algo": "NVFP4"}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    assert_refused(lambda: open_checkpoint(tmp_path), "quant_algo", "'NVFP4'", "hf_quant_config.json")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.float64]
)
def test_numbers_that_nothing_describes(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = write_directory(tmp_path, {f"{MODULE}.weight": torch.ones(4, 4).to(dtype)}, None)
    kind = str(dtype).removeprefix("torch.")
    assert_refused(lambda: checkpoint.tensor(f"{MODULE}.weight"), f"{MODULE}.weight", kind, "config.json")


@pytest.mark.parametrize(
    ("layout", "parts", "words"),
    [
        ("deepseek", {"weight_scale_inv": scales(2, 1)}, "shape [2, 2]"),
        ("fp8-tensor", {"weight_scale": scales(2, 2)}, "one number"),
        ("ct-channel", {"weight": torch.ones(ROWS, COLUMNS)}, "float8_e4m3fn"),
        ("modelopt", {"weight": torch.ones(ROWS, COLUMNS).to(torch.float8_e5m2)}, "float8_e5m2"),
    ],
)
def test_parts_that_do_not_fit(
    layout: str, parts: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    checkpoint = write(tmp_path, layout, **parts)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.tensor(f"{MODULE}.weight")
    assert words in str(caught.value)
