"""What model a checkpoint is: as config.json says, and as its tensors do where that is silent or wrong."""

from __future__ import annotations

import logging

import torch

from engine.loading.checkpoint import Checkpoint
from engine.loading.leftovers import check_leftovers
from engine.models.config import ModelConfig
from engine.parallel.shards import Slices
from engine.quant_spec import EMBEDDING, LM_HEAD

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 8192


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model's configuration, which has a place for every tensor of the checkpoint that matters.

    Raises:
        CheckpointError: As `ModelConfig.from_dict` and `check_leftovers`.
    """
    config = ModelConfig.from_dict({**checkpoint.config, "tie_word_embeddings": _ties_embeddings(checkpoint)})
    check_leftovers(checkpoint, config)
    return config


def _ties_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding's table: as transformers decides, not if a head of its own is stored."""
    is_said = bool(checkpoint.config.get("tie_word_embeddings"))
    has_head = f"{LM_HEAD}.weight" in checkpoint.names()
    if is_said and has_head and not _is_head_the_table(checkpoint):
        logger.warning(
            "%s: tie_word_embeddings is true, and lm_head.weight differs from the embedding: the head is used",
            checkpoint.path,
        )
        return False
    if not is_said and not has_head:
        logger.warning(
            "%s: tie_word_embeddings is false, and there is no lm_head.weight: the embedding's table is the head",
            checkpoint.path,
        )
    return is_said or not has_head


def _is_head_the_table(checkpoint: Checkpoint) -> bool:
    names = (f"{LM_HEAD}.weight", f"{EMBEDDING}.weight")
    num_rows: int = checkpoint.config["vocab_size"]
    for start in range(0, num_rows, _ROWS_AT_A_TIME):
        rows = Slices(slice(start, min(start + _ROWS_AT_A_TIME, num_rows)))
        head, table = (checkpoint.tensor(name, rows) for name in names)
        if not (isinstance(head, torch.Tensor) and isinstance(table, torch.Tensor)):
            return False
        if head.dtype != table.dtype or not torch.equal(head, table):
            return False
    return True
