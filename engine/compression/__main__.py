"""Makes a quantized checkpoint: `python -m engine.quant llama --group 64 --algorithm gptq --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from engine.compression.calibration import CalibrationText, default_text
from engine.compression.quantize import quantize_checkpoint
from engine.compression.recipe import Recipe
from engine.errors import ConfigError, EngineError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.quant.plan import SCHEMES
from engine.quant_spec import CHOICES, KINDS
from engine.tokenizer.tokenizer import load_tokenizer

_SCHEME = "int4"
_KINDS = sorted(CHOICES, key=lambda kind: (kind == "none", kind != _SCHEME))
"""The default first, and what is no quantization last."""

_SCHEME_LINES = "\n".join(f"  {form:<24} {stored}" for kind in _KINDS for form, stored in KINDS[kind].help)
_ROUNDED = [kind for kind in CHOICES if SCHEMES[kind].round is not None]
"""Those that steps which look for grids are not for, nor published formats."""

_DETAILS = f"""\
schemes (--scheme), each followed by what is stored:
{_SCHEME_LINES}
  A, PATTERN=B, ...        A, but B where the module's name matches; the last pattern counts:
                           int4:g64,lm_head=int8,*.down_proj=int8:g32,model.layers.0.*=none
  lm_head and model.embed_tokens stay float16 unless a pattern names them (a table can only be int8); q_proj, k_proj
  and v_proj must agree, and gate_proj and up_proj.

algorithms (--algorithm): steps joined by +, in this order, at most one of each line:
  hadamard      rotates the model so that no channel stands out; unties embeddings; not for Gemma 3
  smoothquant   int8: moves the inputs' large channels into the weights, through norms and up_proj
  awq           int4: gives channels with large inputs finer steps, through norms and up_proj
  rtn           to nearest; the rounding if none is said, and the only one for {" and ".join(_ROUNDED)}
  percentile    int4, int8: to nearest in the range of 99.9 % of a group's values
  mse           int4, int8: to nearest in the range of least squared error
  kl            int4, int8: to nearest below the threshold of least divergence, one for a tensor; made for int8
  clip          int4: the range of least error at the output; the rounding behind awq if none is said
  gptq          int4: later columns make up for the errors of earlier ones
  tune          int4: gradient descent on scales and, without --symmetric, on minimums, which then are no whole
                zero-points; behind gptq the codes stay
  In a mixed scheme a step is for the modules that it can be for; the others are rounded to nearest. With the scheme
  none, hadamard and smoothquant make a float checkpoint that is to be quantized when it is served.

What is written is compressed-tensors, which vLLM and transformers read too, where that can express all modules: int4
and int8 in whole rows or groups that fill them. Short last groups, tuned minimums, {", ".join(_ROUNDED)} and an int8
embedding go into this engine's own layout. It says which. transformers (5.23, compressed-tensors 0.20) reads
zero-points only with dequantize=True, and mixed schemes only without: --symmetric suits both.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.quant",
        description="Quantize a float checkpoint; an interrupted run goes on where it stopped.",
        epilog=_DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="as for engine.serve: alias, directory, .gguf file or Hugging Face repository id")
    add("--scheme", default=_SCHEME, help=f"what weights become, see below (default: {_SCHEME})")
    add(
        "--group",
        type=int,
        metavar="SIZE",
        help="elements that share a scale: 32, 64, 128, or 0 for whole rows; the same as :gSIZE behind the scheme "
        "(default: 32 for int4, 0 for int8)",
    )
    add("--symmetric", action="store_true", help="int4 without zero-points; int8 has none")
    add("--algorithm", default="rtn", help="how, see below: rtn, awq, hadamard+gptq+tune, ... (default: rtn)")
    add("--calibration", type=Path, metavar="FILE", help="text (default: Python's help topics)")
    add("--windows", type=int, default=64, help="windows of the text (default: 64)")
    add("--length", type=int, default=512, help="tokens in each (default: 512)")
    add("--seed", type=int, default=0, help="of where the windows lie (default: 0)")
    add("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint; 0, or 2 if it cannot be."""
    options = parse_arguments(arguments)
    try:
        recipe = Recipe.parse(options.scheme, options.algorithm, options.group, options.symmetric)
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
