"""A checkpoint, loaded as floats, beside the model that transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from engine.config import EngineConfig
from engine.executor.runner import ModelRunner
from engine.loading.checkpoint import open_checkpoint
from tests.helpers.paged import make_sequences, run_chunks
from tests.helpers.tiny import reference_logits

CHUNKS = [[26, 1], [7, 12, 1]]


def assert_same_log_probabilities(path: Path, reference: PreTrainedModel) -> None:
    cache = str(path.parent / "cache")
    config = EngineConfig(
        model=str(path), quant="none", dtype="float32", kv_cache_memory="2MiB", device="cpu", cache_dir=cache
    )
    computed = run_chunks(ModelRunner(config, open_checkpoint(path)), make_sequences(320, CHUNKS), CHUNKS)
    for sequence, rows in zip(make_sequences(320, CHUNKS), computed, strict=True):
        expected = torch.log_softmax(reference_logits(reference, sequence), dim=-1)
        for position, logits in rows.items():
            found = torch.log_softmax(logits, dim=-1)
            torch.testing.assert_close(found, expected[position], atol=1e-4, rtol=0)
            assert found.argmax() == expected[position].argmax()
