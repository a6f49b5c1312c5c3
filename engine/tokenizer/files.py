"""A model's tokenizer and what its files say about tokens, from a GGUF file or a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.errors import CheckpointError
from engine.loading.file_kinds import check_regular, is_gguf
from engine.loading.json_file import read_json
from engine.tokenizer.added_tokens import add_tokens, read_named_tokens

# Roles of tokens as transformers names them, and GGUF.
_GGUF_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What a model says about its tokens besides the vocabulary.

    Attributes:
        special_tokens: Text by role, as chat templates name them: "bos_token", "eos_token"...
        eos_token_ids: Every id that ends a generation.
        chat_templates: Source by name: "default", and "tool_use" where requests with tools have their own.
    """

    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    chat_templates: dict[str, str]


def read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """The tokenizer of a GGUF file, a model directory, or the directory of a file of weights.

    Raises:
        CheckpointError: The tokenizer's files are missing, damaged or of an unsupported kind.
    """
    if path.is_dir():
        return _read_directory(path)
    return _read_gguf(path) if is_gguf(path) else _read_directory(path.parent)


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory has a file that a tokenizer can be read from."""
    return any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _read_gguf(path: Path) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    # Directories load without the gguf package.
    from engine.loading.gguf.config import end_token_ids, token_id
    from engine.loading.gguf.file import GGUFFile
    from engine.tokenizer.gguf import build_tokenizer

    file = GGUFFile(path)
    template = file.get("tokenizer.chat_template")
    try:
        tokens = file["tokenizer.ggml.tokens"]
        settings = TokenizerSettings(
            special_tokens={
                role: tokens[index]
                for role, key in _GGUF_KEYS.items()
                if (index := token_id(file, key)) is not None
            },
            eos_token_ids=tuple(end_token_ids(file)),
            chat_templates={"default": template} if template else {},
        )
        return build_tokenizer(file), settings
    except CheckpointError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(f"{path}: the tokenizer's metadata is damaged ({error})") from error


def _read_directory(path: Path) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    backend = _read_backend(path)
    config = read_json(path / "tokenizer_config.json")
    named = read_named_tokens(path, config)
    add_tokens(backend, named, path)
    special_tokens = {role: token.content for role, token in named.roles.items()}
    settings = TokenizerSettings(
        special_tokens=special_tokens,
        eos_token_ids=_directory_eos_token_ids(
            path, backend.token_to_id(special_tokens.get("eos_token", ""))
        ),
        chat_templates=_directory_chat_templates(path, config.get("chat_template")),
    )
    return backend, settings


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        return _convert_with_transformers(path)
    check_regular(file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust side raises bare Exception, and panics that are none
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{file}: not a valid tokenizer ({reason})") from error
    # Some files keep the settings of the training run.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _convert_with_transformers(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of older formats: tokenizer.model, vocab.json with merges.txt."""
    try:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    except Exception as error:  # transformers raises many kinds, for missing files and packages alike
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path}: there is no tokenizer.json, and transformers cannot convert what is there ({reason});"
            " a tokenizer.model takes: pip install transformers sentencepiece protobuf"
        ) from error
    return backend


def _directory_eos_token_ids(path: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """What generation_config.json says, else config.json; and the tokenizer's own."""
    ids: list[int] = []
    config = read_json(path / "config.json")
    for source in (read_json(path / "generation_config.json"), config, config.get("text_config", {})):
        value = source.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(index) is int for index in ids):
                raise CheckpointError(f"{path}: eos_token_id: expected ids of tokens, found {value!r}")
            break
    return tuple(dict.fromkeys([*ids, *([] if tokenizer_eos is None else [tokenizer_eos])]))


def _directory_chat_templates(path: Path, configured: Any) -> dict[str, str]:
    """Templates by name: files of their own come before what tokenizer_config.json has."""
    templates: dict[str, str] = {}
    if configured is None:
        configured = read_json(path / "chat_template.json").get("chat_template")
    if isinstance(configured, list):
        templates = {
            entry["name"]: entry["template"]
            for entry in configured
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
    elif configured is not None:
        templates = {"default": configured}
    for name, file in [
        ("default", path / "chat_template.jinja"),
        *((file.stem, file) for file in sorted((path / "additional_chat_templates").glob("*.jinja"))),
    ]:
        if file.exists():
            templates[name] = _read_text(file)
    wrong = next((name for name, template in templates.items() if not isinstance(template, str)), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: chat template {wrong!r}: expected text, found {templates[wrong]!r}")
    return templates


def _read_text(file: Path) -> str:
    check_regular(file)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer for a directory without one: each byte is a token, ids 0 … 255."""
    vocabulary = {
        character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
