"""Makes a smaller checkpoint: `python -m engine.quant llama --steps "prune=0.5,sparsegpt + int8" --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from engine.compression.calibration import CalibrationText, default_text
from engine.compression.quantize import quantize_checkpoint
from engine.compression.recipe import Recipe
from engine.compression.steps import ORDER, ROUNDED, WORDS
from engine.errors import ConfigError, EngineError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.quant_spec import CHOICES, KINDS
from engine.tokenizer.tokenizer import load_tokenizer

_SCHEME = "int4"
_KINDS = sorted(CHOICES, key=lambda kind: (kind == "none", kind != _SCHEME))
"""The default first, and what is no quantization last."""

_SCHEME_LINES = "\n".join(f"  {form:<24} {stored}" for kind in _KINDS for form, stored in KINDS[kind].help)
_STEP_LINES = "\n".join(
    f"  {word.name + word.form if number == 0 else '':<16} {line}"
    for word in WORDS
    for number, line in enumerate(word.help)
)

_DETAILS = f"""\
schemes (--scheme, or last in --steps), each followed by what is stored:
{_SCHEME_LINES}
  A, PATTERN=B, ...        A, but B where the module's name matches; the last pattern counts:
                           int4:g64,lm_head=int8,*.down_proj=int8:g32,model.layers.0.*=none
  lm_head and model.embed_tokens stay float16 unless a pattern names them (a table can only be int8); q_proj, k_proj
  and v_proj must agree, and gate_proj and up_proj.

steps (--steps): joined by +, in this order, and last a scheme, "prune=0.5,wanda + gptq + int4:g64":
{_STEP_LINES}
  The one order: {ORDER} + SCHEME
  --scheme S --algorithm A means A + S.
  In a mixed scheme a step is for the modules that it can be for; the others are rounded to nearest. With the scheme
  none what is made is a float checkpoint, which may be quantized when it is served.

What is written is compressed-tensors, which vLLM and transformers read too, where that can express all modules: int4
and int8 in whole rows or groups that fill them. Short last groups, tuned minimums, {", ".join(ROUNDED)} and an int8
embedding go into this engine's own layout. It says which. transformers (5.23, compressed-tensors 0.20) reads
zero-points only with dequantize=True, and mixed schemes only without: --symmetric suits both.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.quant",
        description="Compress a float checkpoint; an interrupted run goes on where it stopped.",
        epilog=_DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="as for engine.serve: alias, directory, .gguf file or Hugging Face repository id")
    add("--steps", help="what is done, and last what weights become, see below: 'prune=0.5,sparsegpt + int8'")
    add("--scheme", help=f"what weights become, see below (default: {_SCHEME})")
    add(
        "--group",
        type=int,
        metavar="SIZE",
        help="elements that share a scale: 32, 64, 128, or 0 for whole rows; the same as :gSIZE behind the scheme "
        "(default: 32 for int4, 0 for int8)",
    )
    add("--symmetric", action="store_true", help="int4 without zero-points; int8 has none")
    add("--algorithm", help="how: steps without the scheme, rtn, awq, hadamard+gptq+tune, ... (default: rtn)")
    add("--calibration", type=Path, metavar="FILE", help="text (default: Python's help topics)")
    add("--windows", type=int, default=64, help="windows of the text (default: 64)")
    add("--length", type=int, default=512, help="tokens in each (default: 512)")
    add("--seed", type=int, default=0, help="of where the windows lie (default: 0)")
    add("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    add(
        "--dense",
        type=Path,
        metavar="DIR",
        help="directory for the same numbers as float16, zeros as zeros, which vLLM and transformers read",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint; 0, or 2 if it cannot be."""
    options = parse_arguments(arguments)
    try:
        recipe = _parse_recipe(options)
        path = resolve_model(options.model)
        text = CalibrationText.sample(
            _read_text(options.calibration),
            load_tokenizer(path),
            options.windows,
            options.length,
            options.seed,
        )
        quantize_checkpoint(open_checkpoint(path), recipe, text, options.out, tqdm.write, options.dense)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"serve it with: python -m engine.serve --model {options.out}")
    return 0


def _parse_recipe(options: argparse.Namespace) -> Recipe:
    if options.steps is None:
        scheme, algorithm = options.scheme or _SCHEME, options.algorithm or "rtn"
        return Recipe.parse(scheme, algorithm, options.group, options.symmetric)
    if options.scheme is not None or options.algorithm is not None:
        raise ConfigError("steps: say all that --scheme and --algorithm do; leave these out")
    return Recipe.parse_steps(options.steps, options.group, options.symmetric)


def _read_text(file: Path | None) -> str:
    if file is None:
        return default_text()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration: {file} cannot be read ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
