"""Writes quantized checkpoints: a directory that this engine serves and, where its format can express the grid, that
compressed-tensors' readers (vLLM, transformers) load.

Every layer is a shard of its own, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.kernels.nibbles import pack_nibbles
from engine.loading.checkpoint import Checkpoint
from engine.quant.weight import GridWeight
from engine.quant_spec import EMBEDDING, LM_HEAD, SchemeSpec
from engine.tokenizer.files import read_tokenizer

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*")


def pack_words(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """[R, C] uint8 → [R, ceil(C bits / 32)] int32, a row's first code in a word's lowest bits."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    words = pack_nibbles(padded) if bits == 4 else padded
    return words.flatten().view(torch.int32).view(codes.shape[0], -1)


def is_expressible(words: SchemeSpec, in_features: int, has_float_minimums: bool) -> bool:
    """Whether compressed-tensors holds a weight of this scheme: whole rows, or groups that fill them.

    Args:
        has_float_minimums: int4 codes of zero are no whole numbers.
    """
    if words.kind == "none":
        return True
    if (
        words.kind not in ("int4", "int8")
        or words.is_rotated
        or (words.kind == "int4" and has_float_minimums)
    ):
        return False
    return words.group_size == 0 or in_features % words.group_size == 0


def compressed_tensors(weight: GridWeight, words: SchemeSpec, is_symmetric: bool) -> dict[str, torch.Tensor]:
    """The parts of a module: "int-quantized" for int8 rows with int8 activations, else "pack-quantized".

    Args:
        weight: Minimums are whole multiples of -scale, 0 to 15 times.
        is_symmetric: Of int4.
    """
    if not _is_packed(words):
        return {"weight": weight.codes, "weight_scale": weight.scale}
    parts = {"weight_scale": weight.scale, "weight_shape": torch.tensor(weight.shape)}
    if words.kind == "int8":
        # Packed codes are larger by 128: the highest bit flipped.
        return parts | {"weight_packed": pack_words(weight.codes.view(torch.uint8) ^ 0x80, 8)}
    parts["weight_packed"] = pack_words(weight.codes)
    if not is_symmetric:
        assert weight.minimum is not None
        zero = (-weight.minimum.float() / weight.scale.float()).round().to(torch.uint8)
        parts["weight_zero_point"] = pack_words(zero.t().contiguous()).t().contiguous()
    return parts


def compressed_tensors_config(schemes: Mapping[str, SchemeSpec], is_symmetric: bool) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        schemes: Of all modules, the vocabulary projection among them; not all "none".
        is_symmetric: Of int4.
    """
    modules: dict[SchemeSpec, list[str]] = defaultdict(list)
    for module, words in schemes.items():
        if module != EMBEDDING:
            modules[words].append(module)
    ignored = modules.pop(SchemeSpec("none"), [])
    if len(modules) == 1 and ignored == [LM_HEAD]:
        # As llm-compressor writes it where layers are all alike.
        targets, ignore = [["Linear"]], ignored
    else:
        targets = [_targets(names, schemes) for names in modules.values()]
        ignore = _targets(ignored, schemes)
    layouts = [_layout(words) for words in modules]
    is_mixed = len(set(layouts)) > 1
    groups = {
        f"group_{index}": {"targets": target}
        | _arguments(words, is_symmetric)
        # Readers before 0.11 know no layout of a group.
        | ({"format": layout} if is_mixed else {})
        for index, (target, words, layout) in enumerate(zip(targets, modules, layouts, strict=True))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if is_mixed else layouts[0],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }


def _is_packed(words: SchemeSpec) -> bool:
    return words.kind == "int4" or words.group_size != 0 or words.is_weight_only


def _layout(words: SchemeSpec) -> str:
    return "pack-quantized" if _is_packed(words) else "int-quantized"


def _arguments(words: SchemeSpec, is_symmetric: bool) -> dict[str, Any]:
    """What a config group says of weights and activations; int8 ones have a scale a token."""
    weights = {
        "num_bits": 4 if words.kind == "int4" else 8,
        "type": "int",
        "symmetric": is_symmetric or words.kind == "int8",
        "dynamic": False,
        "strategy": "group" if words.group_size else "channel",
        "group_size": words.group_size or None,
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"weights": weights, "input_activations": None if _is_packed(words) else activations}


def _targets(modules: Iterable[str], known: Iterable[str]) -> list[str]:
    """Patterns that match these modules and no other of the known ones: one for each name within a layer."""
    chosen, everywhere = _by_layer(modules), _by_layer(known)
    targets = []
    for name, layers in chosen.items():
        if layers == [None]:
            targets.append(name)
            continue
        numbers = "\\d+" if layers == everywhere[name] else f"(?:{'|'.join(map(str, layers))})"
        targets.append(f"re:model\\.layers\\.{numbers}\\.{re.escape(name)}$")
    return targets


def _by_layer(modules: Iterable[str]) -> dict[str, list[str | None]]:
    """The layers of each name within a layer; None for what is in none."""
    layers: dict[str, list[str | None]] = defaultdict(list)
    for module in modules:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        name, layer = (module, None) if match is None else (match[2], match[1])
        layers[name].append(layer)
    return dict(layers)


def write_shard(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes beside the target and renames: a shard is there whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"})
    os.replace(partial, path)


def of_float16(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json for floats that are stored so: others would be rounded to the source's type."""
    return {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": "float16"}


def write_directory(
    directory: Path, checkpoint: Checkpoint, config: dict[str, Any], shards: Mapping[str, list[str]]
) -> None:
    """Writes what makes shards a checkpoint: index, configuration and tokenizer.

    Args:
        checkpoint: What it was made of.
        config: The keys of config.json.
        shards: The tensors' names by file name.
    """
    weight_map = {name: file for file, names in shards.items() for name in names}
    size = sum((directory / file).stat().st_size for file in shards)
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )
    _write_json(directory / "config.json", config)
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
