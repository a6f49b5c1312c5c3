"""Checkpoints that are made before they are measured: one of each recipe and calibration.

They are kept, and found again by a later run: the directory's name holds a digest of all that went into it (but not
of the code that made it).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from engine.compression.calibration import CalibrationText, default_text
from engine.compression.quantize import quantize_checkpoint
from engine.compression.recipe import Recipe
from engine.errors import ConfigError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.loading.weights import checkpoint_key
from engine.quant.plan import SCHEMES
from engine.tokenizer.tokenizer import load_tokenizer

NUM_WINDOWS = 64
WINDOW_LENGTH = 512
"""Tokens in a window of the calibration text, of which `NUM_WINDOWS` are taken, as `python -m engine.quant` does."""

_WITHOUT_CALIBRATION = ("hadamard", "rotate", "rtn", "percentile", "kl")
_FINISHED = "config.json"
"""What is written when all weights are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checkpoint to be made, in a process of its own.

    Attributes:
        title: For what shows progress.
        model: As the command's.
        calibration: The text; the same for every seed.
        seed: Of where its windows lie.
        directory: Where it goes.
    """

    title: str
    model: str
    recipe: Recipe
    calibration: str
    seed: int
    directory: Path


def is_calibrated(recipe: Recipe) -> bool:
    """Whether what it finds depends on a text."""
    schemes = [recipe.quant_spec.default, *(words for _, words in recipe.quant_spec.rules)]
    weighs_columns = any(SCHEMES[words.kind].weighs_columns for words in schemes)
    return weighs_columns or not {step.name for step in recipe.steps} <= set(_WITHOUT_CALIBRATION)


def read_calibration(file: Path | None, scored: str) -> str:
    """The text to calibrate on: a file's, or Python's help topics.

    Args:
        scored: The text that variants are measured on.

    Raises:
        ConfigError: The file cannot be read; or one text holds the other: what was seen is no measure.
    """
    try:
        text = default_text() if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration: {file} cannot be read as UTF-8 ({error})") from error
    if text.strip() and (scored.strip() in text or text.strip() in scored):
        name = "Python's help topics hold" if file is None else f"{file} holds"
        raise ConfigError(f"calibration: {name} the text that is scored; give another --calibration")
    return text


def checkpoint_directory(parent: Path, model: Path, recipe: Recipe, calibration: str, seed: int) -> Path:
    """Where a checkpoint goes: readable words, and a digest of what goes into it."""
    content = f"{checkpoint_key(open_checkpoint(model))}\n{recipe.description}\n{seed}\n{calibration}"
    words = re.sub(r"[^\w.*]+", "-", f"{recipe.quant_spec.default}-{recipe.algorithm}")
    return parent / f"{words}-{seed}-{hashlib.blake2b(content.encode(), digest_size=6).hexdigest()}"


def make_checkpoint(job: Job) -> None:
    """Makes the checkpoint, or what is missing of it; at once where it is finished.

    Raises:
        EngineError: It cannot be made.
    """
    if (job.directory / _FINISHED).exists():
        tqdm.write(f"{job.title}: is there already, {job.directory}")
        return
    tqdm.write(f"{job.title}: is made")
    path = resolve_model(job.model)
    text = CalibrationText.sample(job.calibration, load_tokenizer(path), NUM_WINDOWS, WINDOW_LENGTH, job.seed)
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    quantize_checkpoint(open_checkpoint(path), job.recipe, text, job.directory, tqdm.write)
