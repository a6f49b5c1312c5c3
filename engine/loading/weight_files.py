"""Which files of a directory hold a model's weights, and which of their tensors are the text model's."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open

from engine.errors import CheckpointError
from engine.loading.file_kinds import check_regular, foreign_error, foreign_kind
from engine.loading.json_file import read_json

# The names that transformers gives, the preferred ones first: a single file, or the index of several.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# Files that lie beside a model's, and are not its weights.
_OTHERS = ("adapter_", "training_args", "optimizer", "scheduler", "rng_state", "scaler", "consolidated")

# Under which names training programs put the weights beside their own state.
_STATE_KEYS = ("state_dict", "model_state_dict")

_TABLE = re.compile(r"(.*?)embed_tokens\.")
_LAYER = re.compile(r"(.*?)layers\.\d+\.(?:self_attn|mlp)\.")
_OF_BASE_MODEL = re.compile(r"(embed_tokens|layers|norm)\.")
_USUAL_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "module.model.")

Locations = dict[str, tuple[Path, str]]
"""The file and the name there of every tensor."""


def stored_tensors(path: Path) -> dict[str, Path]:
    """The file of every tensor, by the name that it has there.

    Args:
        path: A directory, or one file of weights.

    Raises:
        CheckpointError: No weights are there, some are missing or damaged, or there are several files of one tensor.
    """
    if path.is_file():
        return dict.fromkeys(_names(path), path)
    for single, index in (_SAFETENSORS, _PICKLED):
        if (path / single).exists():
            return dict.fromkeys(_names(path / single), path / single)
        if (path / index).exists():
            return _read_index(path / index)
        files = _other_files(path, PurePosixPath(single).suffix)
        if files:
            return _join(files)
    kind = foreign_kind(path)
    if kind is not None:
        raise foreign_error(path, kind)
    raise CheckpointError(f"{path}: no weights are there, neither *.safetensors nor *.bin")


def locate_text_model(path: Path) -> tuple[Locations, Locations]:
    """The text model's tensors, by the names that they have in a model which is nothing else; and all others.

    Programs put a word before the names (`module.`, `language_model.`), or leave `model.` out: what stands before
    the embedding's table says which.

    Raises:
        CheckpointError: As `stored_tensors`.
    """
    stored = stored_tensors(path)
    prefix = _text_prefix(stored)
    text: Locations = {}
    others: Locations = {}
    for name, file in stored.items():
        before, head, rest = name.rpartition("lm_head.")
        if head and prefix.startswith(before):
            text[head + rest] = (file, name)
        elif name.startswith(prefix) and (prefix or _OF_BASE_MODEL.match(name)):
            text["model." + name.removeprefix(prefix)] = (file, name)
        else:
            others[name] = (file, name)
    return text, others


def open_weight_file(file: Path) -> Any:
    """A lazy reader of one file: safe_open's handle, or a dictionary of memory-mapped tensors.

    Raises:
        CheckpointError: It is missing, damaged, or no dictionary of tensors.
    """
    check_regular(file)
    kind = None if file.suffix == ".safetensors" or not file.exists() else foreign_kind(file)
    if kind is not None:
        raise foreign_error(file, kind)
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")  # type: ignore[no-untyped-call, unused-ignore]
        # Files of torch < 1.6 are no zip archives and cannot be mapped.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    # Of a damaged archive torch's unpickler raises whatever the bytes make it do.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file}: damaged or unreadable ({reason}); download it again") from error
    for key in _STATE_KEYS:
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(
            f"{file}: expected a dictionary of tensors by name, found {type(tensors).__name__}"
        )
    return tensors


def _names(file: Path) -> list[str]:
    return list(open_weight_file(file).keys())


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map: expected an object of file names by tensor")
    directory = index.parent
    for name in sorted(set(weight_map.values())):
        # A file name alone: nothing outside the directory is opened on an index's word.
        if PurePosixPath(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index}: weight_map: expected a file of this directory, found {name!r}")
    missing = sorted({file for file in weight_map.values() if not (directory / file).exists()})
    if missing:
        raise CheckpointError(f"{directory}: {missing[0]} is missing ({len(missing)} of its shards are)")
    return {name: directory / file for name, file in weight_map.items()}


def _other_files(path: Path, suffix: str) -> list[Path]:
    """Files of weights under other names; Mistral's consolidated ones where there is nothing else."""
    files = [file for file in sorted(path.glob(f"*{suffix}")) if not file.name.startswith(_OTHERS)]
    return files or sorted(path.glob(f"consolidated*{suffix}"))


def _join(files: Iterable[Path]) -> dict[str, Path]:
    stored: dict[str, Path] = {}
    for file in files:
        for name in _names(file):
            if name in stored:
                raise CheckpointError(
                    f"{file}: tensor {name!r} is in {stored[name].name}, too; name one of the files with --model"
                )
            stored[name] = file
    return stored


def _text_prefix(names: Collection[str]) -> str:
    """What stands before "embed_tokens." in the text model's names; before its layers' where there is no table."""
    # The table may be stored in parts: its codes and their scales.
    for place in (_TABLE, _LAYER):
        found = {match[1] for name in names if (match := place.match(name))}
        if found:
            return next((prefix for prefix in _USUAL_PREFIXES if prefix in found), min(found, key=len))
    return "model."
