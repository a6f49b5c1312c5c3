"""The command: makes and measures each variant in processes of its own, and writes what came of it."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from engine.config import Device, EngineConfig, format_bytes
from engine.errors import ConfigError, EngineError
from engine.kernels import cpu
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from engine.models.config import ModelConfig
from engine.quality.making import Job, checkpoint_directory, make_checkpoint, read_calibration
from engine.quality.measure import DECODE_TOKENS, NUM_PARALLEL, STEP_TOKENS, Measurement, Task, measure
from engine.quality.report import Result, check_plotting, format_table, summarize, write_report
from engine.quality.variant import Variant, parse_variant, parse_variants
from engine.tokenizer.tokenizer import load_tokenizer

PROMPT_TOKENS = 64
PREFILL_TOKENS = 512

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class Run:
    """A variant as it is made and measured once.

    Attributes:
        seed: Of its calibration.
        title: For what shows progress.
        config: The engine.
        job: What is made first, if anything is.
    """

    variant: Variant
    seed: int
    title: str
    config: EngineConfig
    job: Job | None


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.quality",
        description="Measure what choices of compression cost, beside a reference, on a text and on this machine.",
    )
    parser.add_argument("model", help="alias, directory, .gguf file or Hugging Face repository id")
    parser.add_argument(
        "--variants",
        required=True,
        help="with commas: what --quant takes (auto, none, int8, int4:g64, …); with an algorithm (int4:g128:gptq), "
        "checkpoints that are made first, under --out; DIRECTORY or dir=PATH; each with [:kv=TYPE]",
    )
    parser.add_argument(
        "--reference",
        default="none",
        help="the variant that the others are compared with; measured in any case (default: %(default)s)",
    )
    parser.add_argument("--text", required=True, type=Path, help="file in UTF-8 that is scored")
    parser.add_argument("--out", required=True, type=Path, help="directory for quality.md, .json and .png")
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="calibrations of each variant that has any (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text to calibrate on; default: Python's help topics"
    )
    parser.add_argument("--num-tokens", type=int, help="of the text, from its start; default: all")
    parser.add_argument(
        "--window", type=int, default=1024, help="most tokens of context (default: %(default)s)"
    )
    parser.add_argument(
        "--stride", type=int, default=512, help="tokens from window to window (default: %(default)s)"
    )
    parser.add_argument("--prompts", type=int, default=8, help="cut from the text (default: %(default)s)")
    parser.add_argument(
        "--continuation", type=int, default=64, help="tokens after each prompt (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", choices=get_args(Device), help="where the model runs")
    return parser


def run(options: argparse.Namespace) -> list[Result]:
    """Measures and writes.

    Raises:
        EngineError: An option, the text, a model or a variant cannot work; one line.
    """
    check_plotting()
    variants = _with_reference(parse_variants(options.variants), options.reference)
    path = resolve_model(options.model)
    model = ModelConfig.from_dict(open_checkpoint(path).config)
    _check(options, model, variants)
    data, token_ids, bos_token_id = _read_text(options, path)
    context = min(
        model.max_position_embeddings,
        max(options.window, PROMPT_TOKENS + options.continuation, PREFILL_TOKENS + 1 + DECODE_TOKENS),
    )
    prompt_size = min(PROMPT_TOKENS, len(token_ids), context - options.continuation)
    prefill_size = min(PREFILL_TOKENS, context - 1 - DECODE_TOKENS)
    common = {
        "device": options.device,
        "max_model_len": context,
        "max_num_seqs": NUM_PARALLEL,
        "max_num_batched_tokens": STEP_TOKENS,
        "enable_prefix_caching": False,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    _check_room(options.out, (len(token_ids) - 1) * model.vocab_size * torch.float32.itemsize)
    is_made = any(variant.recipe is not None for variant in variants)
    calibration = read_calibration(options.calibration, data.decode()) if is_made else None
    runs = _plan_runs(options, variants, path, calibration, common)
    for each in runs:
        if each.job is not None:
            _apart(each.variant.name, make_checkpoint, each.job)
    measurements: list[Measurement] = []
    # Not in the usual place for temporary files, which may be in memory.
    with tempfile.TemporaryDirectory(dir=options.out) as directory:
        for index, each in enumerate(runs):
            task = Task(
                title=each.title,
                config=each.config,
                token_ids=token_ids,
                bos_token_id=bos_token_id,
                window=options.window,
                stride=options.stride,
                prompts=cut_prompts(token_ids, options.prompts, prompt_size),
                continuation=options.continuation,
                # A short text is repeated.
                speed_prompt=(token_ids * -(-prefill_size // len(token_ids)))[:prefill_size],
                log_probs=Path(directory) / "log_probs",
                is_reference=index == 0,
            )
            measurements.append(_apart(each.variant.name, measure, task))
    results = [
        summarize(
            variant.name,
            {
                each.seed: measurement
                for each, measurement in zip(runs, measurements, strict=True)
                if each.variant is variant
            },
            measurements[0],
        )
        for variant in variants
    ]
    description = {
        "model": options.model,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "text": {"sha256": hashlib.sha256(data).hexdigest(), "num_tokens": len(token_ids)},
        "window": options.window,
        "stride": options.stride,
        "reference": options.reference,
        "calibration": None
        if calibration is None
        else {
            "file": None if options.calibration is None else str(options.calibration),
            "sha256": hashlib.sha256(calibration.encode()).hexdigest(),
        },
        "num_prompts": options.prompts,
        "prompt_tokens": prompt_size,
        "continuation": options.continuation,
        "prefill_tokens": prefill_size,
        "decode_tokens": DECODE_TOKENS,
    }
    write_report(options.out, description, results)
    return results


def _with_reference(variants: list[Variant], reference: str) -> list[Variant]:
    """The reference, then the others."""
    others = [variant for variant in variants if variant.name != reference]
    return [parse_variant(reference), *others]


def _plan_runs(
    options: argparse.Namespace,
    variants: Sequence[Variant],
    path: Path,
    calibration: str | None,
    common: dict[str, Any],
) -> list[Run]:
    """What is made and measured, the reference first: it has one calibration only.

    Args:
        calibration: The text, if a variant is made.
    """
    pairs = [
        (variant, seed)
        for index, variant in enumerate(variants)
        for seed in variant.seeds(options.seeds if index else 1)
    ]
    runs = []
    for index, (variant, seed) in enumerate(pairs):
        place = f"({index + 1} of {len(pairs)})"
        if variant.recipe is None or calibration is None:
            config = variant.config(options.model, **common)
            runs.append(Run(variant, seed, f"{variant.name} {place}", config, None))
            continue
        directory = checkpoint_directory(options.out / "checkpoints", path, variant.recipe, calibration, seed)
        title = f"{variant.name}, seed {seed} {place}"
        job = Job(
            title=title,
            model=options.model,
            recipe=variant.recipe,
            calibration=calibration,
            seed=seed,
            directory=directory,
        )
        runs.append(Run(variant, seed, title, variant.config(str(directory), **common), job))
    return runs


def _check(options: argparse.Namespace, model: ModelConfig, variants: Sequence[Variant]) -> None:
    if not 2 <= options.window <= model.max_position_embeddings:
        raise ConfigError(
            f"window: must be from 2 to the model's context of {model.max_position_embeddings} tokens, "
            f"got {options.window}"
        )
    if not 1 <= options.stride < options.window:
        raise ConfigError(
            f"stride: must be at least 1 and less than the window's {options.window} tokens, got {options.stride}"
        )
    if options.num_tokens is not None and options.num_tokens < 2:
        raise ConfigError(f"num_tokens: must be at least 2, got {options.num_tokens}")
    if options.seeds < 1:
        raise ConfigError(f"seeds: must be at least 1, got {options.seeds}")
    if options.prompts < 1:
        raise ConfigError(f"prompts: must be at least 1, got {options.prompts}")
    if not 1 <= options.continuation < model.max_position_embeddings:
        raise ConfigError(
            f"continuation: must be from 1 to less than the model's context of {model.max_position_embeddings} "
            f"tokens, got {options.continuation}"
        )
    for variant in variants:
        if "model" in variant.options:
            other = ModelConfig.from_dict(open_checkpoint(resolve_model(variant.options["model"])).config)
            if other.vocab_size != model.vocab_size:
                raise ConfigError(
                    f"variant {variant.name!r}: its vocabulary has {other.vocab_size} tokens, {options.model}'s has "
                    f"{model.vocab_size}; compare variants of one model"
                )


def _read_text(options: argparse.Namespace, path: Path) -> tuple[bytes, list[int], int | None]:
    """The text's bytes and tokens, and the BOS token if the tokenizer begins every text with it."""
    try:
        data = options.text.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text: {options.text} cannot be read as UTF-8 ({error})") from error
    tokenizer = load_tokenizer(path)
    token_ids = tokenizer.encode(text)[: options.num_tokens]
    if len(token_ids) < 2:
        raise ConfigError(f"text: {options.text} has {len(token_ids)} tokens; give a file of at least 2")
    begins_with_bos = tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return data, token_ids, tokenizer.bos_token_id if begins_with_bos else None


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ConfigError(
            f"out: the reference's log-probabilities take {format_bytes(needed)} while this runs, and {directory} "
            f"has {format_bytes(free)} free; give a smaller --num-tokens or another --out"
        )


def cut_prompts(token_ids: Sequence[int], count: int, size: int) -> list[list[int]]:
    """`count` parts of a text of `size` tokens each, evenly apart."""
    last = len(token_ids) - size
    starts = [index * last // max(1, count - 1) for index in range(count)]
    return [list(token_ids[start : start + size]) for start in starts]


def _apart(name: str, function: Callable[[In], Out], argument: In) -> Out:
    """What the function makes of its argument, called in a new process."""
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, argument).result()
    except BrokenProcessPool as error:
        raise EngineError(f"variant {name!r}: its process died; was there too little memory?") from error


def describe_machine() -> dict[str, Any]:
    """What this runs on, as JSON values."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    except OSError:
        pass  # not Linux
    return {
        "processor": processor,
        "usable_cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": cpu.describe(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the options, measures, and prints the table. Returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        results = run(options)
    except EngineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(format_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
