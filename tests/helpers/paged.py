"""Runs a model over the paged cache without a scheduler: the test says how each sequence arrives."""

from __future__ import annotations

import random
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.core.batch import Batch, BatchRow, Draw
from engine.core.sampling_params import SamplingParams
from engine.executor.runner import ModelRunner
from engine.loading.checkpoint import open_checkpoint

BLOCK_SIZE = 16

CHUNKS = [
    [100] + [1] * 12,
    [37, 37, 20] + [1] * 12,
    [16] * 6 + [1] * 6,
    [5] * 15,
    [1] * 45,
    [3],
]
"""How each sequence of a batch arrives: the tokens it brings to each step, one for a decode."""

DRAW = Draw(params=SamplingParams(), seed=0, index=0, position=0)


def make_runner(path: Path, **options: Any) -> ModelRunner:
    config = EngineConfig(
        model=str(path),
        dtype="float32",
        device="cpu",
        kv_cache_memory="4MiB",
        block_size=BLOCK_SIZE,
        num_threads=1,
        **options,
    )
    return ModelRunner(config, open_checkpoint(path))


def make_sequences(vocab_size: int, chunks: list[list[int]] = CHUNKS) -> list[list[int]]:
    """Random tokens for sequences that arrive in these chunks."""
    source = random.Random(0)
    return [[source.randrange(vocab_size) for _ in range(sum(sizes))] for sizes in chunks]


def run_chunks(
    runner: ModelRunner,
    sequences: list[list[int]],
    chunks: list[list[int]] = CHUNKS,
    admission: int = 0,
) -> list[dict[int, torch.Tensor]]:
    """Feeds the sequences in chunks, all in the same steps, from blocks in random order.

    Args:
        admission: Another one for every run over the same runner.

    Returns:
        For each sequence the logits, [vocabulary] by position, of the last token of every chunk.
    """
    # Whatever is read before it was written shows.
    (runner.cache.data if runner.cache.scales is None else runner.cache.scales).fill_(torch.nan)
    free_blocks = list(range(1, runner.plan.num_blocks + 1))
    random.Random(admission).shuffle(free_blocks)
    tables: list[list[int]] = [[] for _ in sequences]
    ends = [0 for _ in sequences]
    logits: list[dict[int, torch.Tensor]] = [{} for _ in sequences]
    for sizes in zip_longest(*chunks, fillvalue=0):
        rows = []
        active = [index for index, size in enumerate(sizes) if size]
        for index in active:
            start, ends[index] = ends[index], ends[index] + sizes[index]
            while len(tables[index]) * runner.cache.block_size < ends[index]:
                tables[index].append(free_blocks.pop())
            chunk = sequences[index][start : ends[index]]
            rows.append(BatchRow(chunk, start, 0, list(tables[index]), DRAW, index, admission))
        results = runner.execute(Batch(rows)).float().cpu().clone()
        for index, row in zip(active, results, strict=True):
            logits[index][ends[index] - 1] = row
    return logits
