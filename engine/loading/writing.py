"""Writes quantized checkpoints: a directory that this engine serves and, where its format can express the grid, that
compressed-tensors' readers (vLLM, transformers) load.

Every layer is a shard of its own, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.kernels.nibbles import pack_nibbles
from engine.loading.checkpoint import Checkpoint
from engine.loading.formats.own import QUANT_METHOD
from engine.loading.tokenizer_files import read_tokenizer
from engine.quant.weight import GridWeight

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*")


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """[R, C] uint8 of 0..15 → [R, ceil(C / 8)] int32, element c in bits 4 (c % 8) of word c // 8."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    return pack_nibbles(padded).flatten().view(torch.int32).view(codes.shape[0], -1)


def is_expressible(in_features: int, group_size: int) -> bool:
    """Whether compressed-tensors holds int4 groups of a weight: whole rows (0), or groups that fill them."""
    return group_size == 0 or in_features % group_size == 0


def compressed_tensors(weight: GridWeight, is_symmetric: bool) -> dict[str, torch.Tensor]:
    """The parts of a module: "pack-quantized" for four bits, "int-quantized" for eight.

    Args:
        weight: Minimums are whole multiples of -scale, 0 to 15 times.
    """
    if weight.codes.dtype == torch.int8:
        return {"weight": weight.codes, "weight_scale": weight.scale}
    parts = {
        "weight_packed": pack_words(weight.codes),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not is_symmetric:
        assert weight.minimum is not None
        zero = (-weight.minimum.float() / weight.scale.float()).round().to(torch.uint8)
        parts["weight_zero_point"] = pack_words(zero.t().contiguous()).t().contiguous()
    return parts


def own_layout(weight: GridWeight) -> dict[str, torch.Tensor]:
    """The parts of a module in this engine's own layout."""
    assert weight.minimum is not None
    return {"codes": pack_nibbles(weight.codes), "scale": weight.scale, "minimum": weight.minimum}


def compressed_tensors_config(bits: int, group_size: int, is_symmetric: bool) -> dict[str, Any]:
    """`quantization_config` of config.json; eight bits with int8 activations, a scale a token."""
    grid = {"num_bits": bits, "type": "int", "symmetric": is_symmetric, "dynamic": False}
    in_groups = bits == 4 and group_size != 0
    weights = grid | {
        "strategy": "group" if in_groups else "channel",
        "group_size": group_size if in_groups else None,
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if bits == 4 else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None if bits == 4 else activations,
            }
        },
        "ignore": ["lm_head"],
    }


def own_config(group_size: int) -> dict[str, Any]:
    """`quantization_config` of config.json for this engine's own layout."""
    return {"quant_method": QUANT_METHOD, "bits": 4, "group_size": group_size}


def write_shard(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes beside the target and renames: a shard is there whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"})
    os.replace(partial, path)


def write_directory(
    directory: Path, checkpoint: Checkpoint, quantization: dict[str, Any], shards: Mapping[str, list[str]]
) -> None:
    """Writes what makes shards a checkpoint: index, configuration and tokenizer.

    Args:
        shards: The tensors' names by file name.
    """
    weight_map = {name: file for file, names in shards.items() for name in names}
    size = sum((directory / file).stat().st_size for file in shards)
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    _write_json(directory / "config.json", config | {"quantization_config": quantization})
    if checkpoint.generation_config:
        _write_json(directory / "generation_config.json", checkpoint.generation_config)
    if checkpoint.path.is_dir():
        for pattern in _TOKENIZER_FILES:
            for file in checkpoint.path.glob(pattern):
                shutil.copy(file, directory)
        return
    backend, settings = read_tokenizer(checkpoint.path)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings.special_tokens,
    }
    if "default" in settings.chat_templates:
        tokenizer_config["chat_template"] = settings.chat_templates["default"]
    _write_json(directory / "tokenizer_config.json", tokenizer_config)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
