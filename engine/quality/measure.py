"""What is measured of one variant, in a process of its own: its text is scored, its speed and memory are taken.

Logits of every position come from the engine's own steps: the windows of the text run side by side as sequences that
decode the text's tokens instead of drawn ones, through the paged cache that the variant has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from engine.config import EngineConfig
from engine.core.batch import Batch, BatchRow, Draw
from engine.core.engine_core import EngineCore
from engine.core.request import Request
from engine.core.sampling_params import SamplingParams
from engine.errors import ConfigError, EngineError
from engine.executor.runner import ModelRunner
from engine.executor.start import start_engine
from engine.loading.resolve import resolve_model
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline
from engine.quality.metrics import Scores, Window, make_windows
from engine.quant.plan import QuantizationPlan
from engine.quant_spec import parse_quant_spec

NUM_PARALLEL = 16
"""Windows that are scored at a time, cache permitting."""

STEP_TOKENS = 512
"""Most tokens in a step."""

DECODE_TOKENS = 64
REPETITIONS = 3
"""How often the timed run is repeated, after the continuations, which warm up; the median counts."""

ADMISSION = -3
"""The admission of rows that no scheduler planned: a number that it never gives."""

_DRAW = Draw(SamplingParams(temperature=0), seed=0, index=0, position=0)
"""Asks for a row's logits; nothing is drawn from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to measure of one variant.

    Attributes:
        title: Of the progress bar.
        token_ids: The text.
        bos_token_id: What the text begins with, if that is no part of it: then every window begins with it.
        window, stride: As of `make_windows`.
        prompts: Beginnings that are continued greedily, by `continuation` tokens each.
        speed_prompt: What is prefilled and continued for the speeds.
        log_probs: File of the reference's log-probabilities, [tokens - 1, vocabulary] float32.
        is_reference: Whether this variant writes it.
    """

    title: str
    config: EngineConfig
    token_ids: list[int]
    bos_token_id: int | None
    window: int
    stride: int
    prompts: list[list[int]]
    continuation: int
    speed_prompt: list[int]
    log_probs: Path
    is_reference: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured of one variant.

    Attributes:
        bits_per_weight: Bits of all that is stored for the weights, by the number of weights of the model.
        peak_bytes: Most memory that the process held while it generated, loading not counted; None off Linux.
        prefill_rate, decode_rate: Tokens/s of one sequence.
        continuations: Of the prompts.
    """

    perplexity: float
    kl_divergence: float
    agreement: float
    bits_per_weight: float
    peak_bytes: int | None
    prefill_rate: float
    decode_rate: float
    continuations: list[list[int]]


def measure(task: Task) -> Measurement:
    """Loads the variant and measures it. For a process of its own, whose memory it looks at.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError: It cannot be loaded; or there is too little cache.
    """
    core = start_engine(task.config, resolve_model(task.config.model), eos_token_ids=())
    if core.info.max_model_len < (task.config.max_model_len or 0):
        raise ConfigError(
            f"window: the KV cache holds {core.info.max_model_len} tokens of the {task.config.max_model_len} needed; "
            "free memory, or give a smaller --window"
        )
    _reset_peak_memory()
    continuations, _ = generate(core, task.prompts, task.continuation)
    speeds = [_measure_speed(core, task.speed_prompt) for _ in range(REPETITIONS)]
    peak = peak_memory()
    scores = score(core.model.runner, task)
    return Measurement(
        perplexity=scores.perplexity,
        kl_divergence=scores.kl_divergence,
        agreement=scores.agreement,
        bits_per_weight=8 * core.model.runner.plan.weights / count_weights(core.model.runner.model_config),
        peak_bytes=peak,
        prefill_rate=median(prefill for prefill, _ in speeds),
        decode_rate=median(decode for _, decode in speeds),
        continuations=continuations,
    )


def count_weights(config: ModelConfig) -> int:
    """Numbers that the model has learned: matrices, embeddings, norms and biases; a tied head counts once."""
    plan = QuantizationPlan(parse_quant_spec("none"), torch.float32)
    return Decoder(config, plan, torch.float32, TensorGroup(), Pipeline()).num_bytes // torch.float32.itemsize


def generate(
    core: EngineCore[Any], prompts: Sequence[list[int]], num_tokens: int
) -> tuple[list[list[int]], list[float]]:
    """Continues prompts greedily, together.

    Returns:
        The tokens of each, and the seconds from the start to the end of every step that brought some.

    Raises:
        EngineError: A sequence failed.
    """
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    continuations: list[list[int]] = [[] for _ in prompts]
    seconds = []
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        core.add_request(Request(request_id=str(index), prompt_token_ids=prompt, params=params, seed=0))
    while core.has_work:
        outputs = core.step()
        for output in outputs:
            if output.error is not None:
                raise EngineError(f"prompt {output.request_id}: {output.error}")
            continuations[int(output.request_id)] += [token.token_id for token in output.tokens]
        if outputs:
            seconds.append(time.perf_counter() - start)
    return continuations, seconds


def _measure_speed(core: EngineCore[Any], prompt: list[int]) -> tuple[float, float]:
    """Tokens/s of the prefill up to the first token, and of the decode after it."""
    _, seconds = generate(core, [prompt], 1 + DECODE_TOKENS)
    return len(prompt) / seconds[0], DECODE_TOKENS / (seconds[-1] - seconds[0])


def score(runner: ModelRunner, task: Task) -> Scores:
    """Scores the text, beside the reference's log-probabilities, which the reference itself writes first."""
    blocks_each = -(-task.window // runner.config.block_size)
    # Sequences of their own, side by side in the cache; block 0 is the null block.
    tables = [
        list(range(1 + slot * blocks_each, 1 + (slot + 1) * blocks_each))
        for slot in range(min(NUM_PARALLEL, runner.plan.num_blocks // blocks_each))
    ]
    windows = make_windows(len(task.token_ids), task.window, task.stride)
    scores = Scores.empty(len(task.token_ids) - 1)
    progress = tqdm(total=len(scores.log_probs), desc=task.title, unit="token")
    with progress, task.log_probs.open("w+b" if task.is_reference else "rb") as file:
        for first in range(0, len(windows), len(tables)):
            for indices, logits in _run_windows(runner, task, windows[first : first + len(tables)], tables):
                log_probs = logits.log_softmax(dim=-1).cpu()
                if task.is_reference:
                    _write_rows(file, indices, log_probs)
                reference = _read_rows(file, indices, log_probs.shape[1])
                scores.add(indices, [task.token_ids[index + 1] for index in indices], log_probs, reference)
                progress.update(len(indices))
    return scores


def _run_windows(
    runner: ModelRunner, task: Task, windows: Sequence[Window], tables: Sequence[list[int]]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Runs windows side by side: the positions of the last tokens of each step, and their logits."""

    def row(slot: int, start: int, end: int, draw: Draw | None) -> BatchRow:
        """The window's tokens at positions `start` up to `end` of the text."""
        window = windows[slot]
        token_ids = task.token_ids[start:end]
        if start == window.start and task.bos_token_id is not None:
            token_ids[0] = task.bos_token_id
        return BatchRow(token_ids, start - window.start, 0, tables[slot], draw, slot, ADMISSION)

    for slot, window in enumerate(windows):
        last = window.first_scored - 1
        for start in range(window.start, last, STEP_TOKENS):
            runner.execute(Batch([row(slot, start, min(start + STEP_TOKENS, last), None)]))
    for step in range(max(window.end - window.first_scored for window in windows)):
        positions = {
            slot: window.first_scored - 1 + step
            for slot, window in enumerate(windows)
            if window.first_scored + step < window.end
        }
        rows = [row(slot, position, position + 1, _DRAW) for slot, position in positions.items()]
        yield list(positions.values()), runner.execute(Batch(rows))


def _write_rows(file: BinaryIO, indices: Sequence[int], rows: torch.Tensor) -> None:
    for index, row in zip(indices, rows.numpy(), strict=True):
        file.seek(index * row.nbytes)
        file.write(row.tobytes())


def _read_rows(file: BinaryIO, indices: Sequence[int], width: int) -> torch.Tensor:
    """Rows of the file, [indices, width] float32."""
    rows = np.empty((len(indices), width), np.float32)
    for index, row in zip(indices, rows, strict=True):
        file.seek(index * row.nbytes)
        row[:] = np.frombuffer(file.read(row.nbytes), np.float32)
    return torch.from_numpy(rows)


def _reset_peak_memory() -> None:
    """From here on counts what this process holds at most, where the system can start anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Bytes that this process held at most (the kernel's VmHWM); None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
