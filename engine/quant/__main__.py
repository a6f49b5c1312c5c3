"""Makes a quantized checkpoint: `python -m engine.quant llama --group 64 --algorithm gptq --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from engine.calibration import CalibrationText, default_text
from engine.errors import ConfigError, EngineError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.quantize import Algorithm, Recipe, quantize_checkpoint
from engine.tokenizer import load_tokenizer


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.quant",
        description="Quantize a float checkpoint; an interrupted run goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="as for engine.serve: alias, directory, .gguf file or Hugging Face repository id")
    add(
        "--scheme",
        choices=["int4", "int8"],
        default="int4",
        help="int8: a scale a row, served with int8 activations",
    )
    add(
        "--group",
        type=int,
        default=None,
        help="elements that share an int4 scale: 32, 64, 128, 0 for whole rows",
    )
    add("--symmetric", action="store_true", help="int4 without zero-points; int8 has none")
    add(
        "--algorithm",
        choices=get_args(Algorithm),
        default="rtn",
        help="rtn: to nearest; mse: ranges of least squared error; gptq; awq",
    )
    add("--calibration", type=Path, metavar="FILE", help="text; default: Python's help topics")
    add("--windows", type=int, default=32, help="windows of the text")
    add("--length", type=int, default=512, help="tokens in each")
    add("--seed", type=int, default=0, help="of where the windows lie")
    add("--out", type=Path, required=True, help="directory to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint; 0, or 2 if it cannot be."""
    options = parse_arguments(arguments)
    is_int8 = options.scheme == "int8"
    group = options.group if options.group is not None else 0 if is_int8 else 32
    try:
        recipe = Recipe(8 if is_int8 else 4, group, options.symmetric or is_int8, options.algorithm)
        path = resolve_model(options.model)
        text = CalibrationText.sample(
            _read_text(options.calibration),
            load_tokenizer(path),
            options.windows,
            options.length,
            options.seed,
        )
        quantize_checkpoint(open_checkpoint(path), recipe, text, options.out, tqdm.write)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"serve it with: python -m engine.serve --model {options.out}")
    return 0


def _read_text(file: Path | None) -> str:
    if file is None:
        return default_text()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration: {file} cannot be read ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
