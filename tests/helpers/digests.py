"""python -m tests.helpers.digests DIRECTORY: the self-test's requests on a directory's models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine.config import EngineConfig
from engine.kernels import cpu
from engine.quality.invariants import digests

QUANTS = ("int8", "int4", "none")


def configurations(directory: Path) -> dict[str, EngineConfig]:
    """Every model with every type of weights, by name."""
    return {
        f"{path.name} {quant}": EngineConfig.from_options(
            model=str(path), quant=quant, device="cpu", num_threads=2
        )
        for path in sorted(directory.iterdir())
        for quant in QUANTS
    }


if __name__ == "__main__":
    loaded = cpu.library()
    results = {
        name: digests(config, Path(config.model))
        for name, config in configurations(Path(sys.argv[1])).items()
    }
    print(json.dumps({"level": loaded and loaded.level, "results": results}))
