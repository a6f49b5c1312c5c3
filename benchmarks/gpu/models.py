"""Checks of whole models: tiny checkpoints of every family, CUDA graphs, overlapped steps, the real model."""

from __future__ import annotations

import importlib
import importlib.util
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.steps import Skipped, Step, Values, equal
from engine.config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.core.request import Request
from engine.core.sampling_params import SamplingParams
from engine.errors import EngineError
from engine.executor.runner import ModelRunner
from engine.executor.start import start_engine
from engine.loading.checkpoint import open_checkpoint
from engine.loading.resolve import resolve_model
from tests.helpers.paged import CHUNKS, make_sequences, run_chunks

TOLERANCES = {"float32": 0.001, "bfloat16": 0.06, "float16": 0.01}
"""By activations: the root mean square of the logits' errors, as a share of their standard deviation.

About twice what the CPU's own bodies in that type bring: at most 0.032 in bfloat16, 0.004 in float16."""

REAL_MODEL = "llama"

Logits = list[dict[int, torch.Tensor]]


@cache
def checkpoint(name: str) -> Path:
    """A tiny random checkpoint of a family, written on first use; it lives as long as the process."""
    tiny: Any = importlib.import_module("tests.helpers.tiny")  # transformers takes seconds to import
    path = Path(_directory().name) / name
    tiny.write_checkpoint(path, tiny.TINY_CONFIGS[name])
    return path


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gpu-check-")


def make_config(path: Path, device: str, dtype: str, **options: Any) -> EngineConfig:
    return EngineConfig(
        **{
            "model": str(path),
            "device": device,
            "dtype": dtype,
            "kv_cache_memory": "8MiB",
            "num_threads": 4,
            "cache_dir": _directory().name,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            **options,
        }
    )


def make_runner(path: Path, device: str, dtype: str, **options: Any) -> ModelRunner:
    return ModelRunner(make_config(path, device, dtype, **options), open_checkpoint(path))


def stack(logits: Logits) -> torch.Tensor:
    return torch.stack([row for sequence in logits for _, row in sorted(sequence.items())])


@cache
def _cpu_logits(name: str, quant: str) -> torch.Tensor:
    runner = make_runner(checkpoint(name), "cpu", "float32", quant=quant)
    return stack(run_chunks(runner, make_sequences(runner.model_config.vocab_size, CHUNKS), CHUNKS))


def compare(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Values:
    """Asserts that errors stay below `tolerance` in the mean, and everywhere below what rounding explains."""
    assert actual.isfinite().all(), "logits are not finite"
    spread = float(expected.std())
    assert spread > 0.1, "the checkpoint is too flat to show differences"
    errors = (actual - expected).abs()
    mean, largest = float(errors.square().mean().sqrt()) / spread, float(errors.max()) / spread
    assert mean <= tolerance, f"logits are off by {mean:.3g} of their deviation, more than {tolerance}"
    # Of some ten thousand errors of a bell curve none is beyond six times their deviation; twice for what is not.
    assert largest <= 12 * tolerance, f"a logit is off by {largest:.3g} deviations"
    return {"error": mean / tolerance}


def _family(name: str, dtype: str, quant: str, device: str, **options: Any) -> Values:
    """Prefill, chunked prefill and decode on the GPU against the CPU in float32."""
    runner = make_runner(checkpoint(name), device, dtype, quant=quant, enforce_eager=True, **options)
    actual = stack(run_chunks(runner, make_sequences(runner.model_config.vocab_size, CHUNKS), CHUNKS))
    tolerance = TOLERANCES[dtype]
    if options.get("kv_cache_dtype") == "fp8_e4m3":
        tolerance *= 4  # three bits behind the point
    elif quant == "int4":
        tolerance *= 1.5  # the CPU's product takes bf16 activations itself
    return compare(actual, _cpu_logits(name, quant), tolerance)


FULL_GRAPHS = [[9] + [1] * 20, [9] + [1] * 20, [30] + [1] * 20, [1] * 21, *([[4] + [1] * 8] * 4)]
"""Decodes of eight sequences, then of four, which graphs are made for: cuBLAS may add up a padded batch otherwise."""

PADDED_GRAPHS = [[9] + [1] * 20, [9] + [1] * 17, [30] + [1] * 12, [1] * 11, [4] + [1] * 8, [4, 1, 1], [5, 1]]
"""Decodes of seven sequences, then fewer."""


def _graphs(name: str, device: str, options: dict[str, Any]) -> Values:
    """Logits with CUDA graphs and without, to the bit."""
    chunks = PADDED_GRAPHS if "quant" in options else FULL_GRAPHS
    logits = []
    for eager in (False, True):
        runner = make_runner(checkpoint(name), device, "auto", enforce_eager=eager, **options)
        sequences = make_sequences(runner.model_config.vocab_size, chunks)
        logits.append(stack(run_chunks(runner, sequences, chunks)))
        count = runner.compilations.count
        assert not count, f"{count} kernels were compiled after the start"
    equal(logits[0], logits[1], "logits with graphs")
    return {}


NUM_REQUESTS = 18

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 12},
    {"temperature": 1.0, "max_tokens": 30},
    {"temperature": 1.0, "max_tokens": 30, "repetition_penalty": 1.8, "frequency_penalty": 1.5},
    {"temperature": 1.5, "max_tokens": 25, "top_k": 20, "n": 3},
    {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True, "logprobs": 3, "top_p": 0.9},
    {"temperature": 1.2, "max_tokens": 1},
]


def generate(core: EngineCore[Any], requests: Sequence[Request]) -> dict[tuple[str, int], list[int]]:
    """Each sample's tokens."""
    tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
    for request in requests:
        core.add_request(request)
    while core.has_work:
        for output in core.step():
            assert output.error is None, f"request {output.request_id}: {output.error}"
            tokens[output.request_id, output.index] += [token.token_id for token in output.tokens]
    return dict(tokens)


def _tokens(name: str, device: str, options: dict[str, Any]) -> Values:
    """The same tokens with and without graphs and overlap, and no kernel compiled on the way."""
    source = random.Random(0)
    requests = [
        Request(
            request_id=str(index),
            prompt_token_ids=[source.randrange(320) for _ in range(source.randrange(1, 60))],
            params=SamplingParams(**PARAMS[index % len(PARAMS)]),
            seed=index,
        )
        for index in range(NUM_REQUESTS)
    ]
    runs = {}
    for eager in (False, True):
        for overlap in (True, False):
            path = checkpoint(name)
            config = make_config(path, device, "auto", enforce_eager=eager, overlap=overlap, **options)
            core = start_engine(config, path, range(3, 23))
            runs[f"eager {eager}, overlap {overlap}"] = generate(core, requests)
            count = core.model.runner.compilations.count
            assert not count, f"{count} kernels were compiled while serving"
    first, *others = runs.items()
    for what, tokens in others:
        different = [key for key in first[1] if tokens[key] != first[1][key]]
        assert not different, f"{what} differs from {first[0]} in {len(different)} of {len(tokens)} samples"
    return {"tokens": sum(len(tokens) for tokens in first[1].values())}


def _real_model(quant: str, device: str) -> Values:
    """The perplexity of its prompts and the likeliest tokens, against the CPU in float32."""
    try:
        path = resolve_model(REAL_MODEL)
    except EngineError as error:
        raise Skipped(f"{REAL_MODEL}: {str(error).splitlines()[0]}") from error
    if path.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
        raise Skipped("the package gguf is not installed")
    from engine.tokenizer.tokenizer import load_tokenizer  # needs packages that nothing else here does

    prompts: list[str] = importlib.import_module("tests.helpers.prompts").PROMPTS

    tokenizer = load_tokenizer(path)
    sequences = [ids for ids in map(tokenizer.encode, prompts) if len(ids) > 8][:8]
    chunks = [[4] + [1] * (len(ids) - 4) for ids in sequences]
    options = {"quant": quant, "kv_cache_memory": "64MiB", "max_model_len": 512}
    host, gpu = (
        run_chunks(make_runner(path, where, dtype, **options), sequences, chunks)
        for where, dtype in (("cpu", "float32"), (device, "auto"))
    )
    expected, actual = _perplexity(host, sequences), _perplexity(gpu, sequences)
    same = (stack(host).argmax(dim=1) == stack(gpu).argmax(dim=1)).float().mean()
    values = {"perplexity": actual, "perplexity on the CPU": expected, "same likeliest token": float(same)}
    assert abs(actual / expected - 1) < 0.03, f"perplexity {actual:.3f}, on the CPU {expected:.3f}"
    assert same > 0.9, f"the likeliest token is the CPU's in {same:.1%} of positions"
    return values


def _perplexity(logits: Logits, sequences: Sequence[Sequence[int]]) -> float:
    losses = [
        -float(row.log_softmax(dim=0)[sequence[position + 1]])
        for sequence, rows in zip(sequences, logits, strict=True)
        for position, row in rows.items()
        if position + 1 < len(sequence)
    ]
    return float(torch.tensor(losses).mean().exp())


def family_steps(names: Sequence[str], device: str) -> list[Step]:
    """Every family in bf16 and float32, and quantized."""
    steps = []
    for name in names:
        runs: list[tuple[str, str, dict[str, Any]]] = [
            ("bfloat16", "none", {}),
            ("float32", "none", {}),
            ("bfloat16", "int8", {}),
            ("bfloat16", "int4", {}),
        ]
        if name == "llama":
            runs += [
                ("float16", "none", {}),
                ("bfloat16", "none", {"kv_cache_dtype": "int8"}),
                ("bfloat16", "none", {"kv_cache_dtype": "fp8_e4m3"}),
                ("bfloat16", "none", {"deterministic": True}),
                ("bfloat16", "int4", {"deterministic": True}),
            ]
        for dtype, quant, options in runs:
            text = " ".join([name, dtype, quant, *(f"{key} {value}" for key, value in options.items())])
            steps.append(Step("tiny models", text, partial(_family, name, dtype, quant, device, **options)))
    return steps


def engine_steps(device: str) -> list[Step]:
    """Graphs, overlap, and the count of kernels compiled while serving."""
    runs: list[tuple[str, dict[str, Any]]] = [
        ("int8", {"quant": "int8"}),
        ("int4", {"quant": "int4"}),
        ("none", {}),
    ]
    checks: list[tuple[str, Callable[..., Values], dict[str, Any]]] = [
        ("graphs bit-equal", _graphs, {}),
        # The batches differ with graphs and overlap: rows must not depend on them.
        ("graphs and overlap same tokens", _tokens, {"deterministic": True}),
    ]
    return [
        Step("graphs and overlap", f"{what}, {quant} {name}", partial(check, name, device, options | extra))
        for quant, options in runs
        for what, check, extra in checks
        for name in ("llama", "gemma3")
    ]


def real_model_steps(device: str) -> list[Step]:
    """The model behind the alias, where it is installed."""
    return [
        Step("real model", f"{REAL_MODEL} {quant}", partial(_real_model, quant, device))
        for quant in ("none", "int8", "int4")
    ]
