"""The record beside a checkpoint: where it comes from, how it was made, and what each module lost.

It is written while the checkpoint is: an interrupted run finds there what it is the beginning of.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

RECORD = "quantization.json"


@dataclass(slots=True)
class Record:
    """What is written to quantization.json.

    Attributes:
        origin: Source, recipe and calibration: what makes the checkpoint this one.
        errors: By module, the output's signal to quantization noise in dB, of those that are quantized.
        pruning_errors: The same for the zeros alone, of those that are pruned.
        structure: What was left out of the model, by step: "layers", "channels".
    """

    directory: Path
    origin: dict[str, Any]
    errors: dict[str, float] = field(default_factory=dict)
    pruning_errors: dict[str, float] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path, origin: dict[str, Any], option: str) -> Record:
        """Makes the directory, or finds in it the beginning of the same.

        Args:
            option: The one that names it.

        Raises:
            ConfigError: It holds something else.
        """
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / RECORD
        if not file.exists():
            if any(directory.iterdir()):
                raise ConfigError(
                    f"{option}: {directory} is not empty, and not of an interrupted run; give another"
                )
            record = Record(directory, origin)
            record.write()
            return record
        found = json.loads(file.read_text(encoding="utf-8"))
        errors, pruning_errors = found.pop("signal_to_noise_db"), found.pop("pruning_signal_to_noise_db", {})
        structure = found.pop("structure", {})
        if found != json.loads(json.dumps(origin)):
            raise ConfigError(
                f"{option}: {directory} is of another model, recipe or calibration; give another"
            )
        return Record(directory, origin, errors, pruning_errors, structure)

    def write(self) -> None:
        """Puts what is known so far into the file."""
        content = self.origin | {"signal_to_noise_db": self.errors}
        if self.structure:
            content["structure"] = self.structure
        if self.pruning_errors:
            content["pruning_signal_to_noise_db"] = self.pruning_errors
        (self.directory / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def mean_error(errors: dict[str, float], layer: int | None = None) -> float:
    """The mean over a layer's modules, or over all; infinite where there are none."""
    prefix = "" if layer is None else f"model.layers.{layer}."
    values = [error for module, error in errors.items() if module.startswith(prefix)]
    return sum(values) / len(values) if values else math.inf
