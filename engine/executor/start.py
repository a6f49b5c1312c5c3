"""Starting an engine: its model on one rank or several, under a step loop."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.cache_directory import caching_in
from engine.config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.core.executor import Executor, ModelFacts
from engine.errors import EngineDeadError
from engine.executor.runner import ModelRunner
from engine.loading.dummy import open_model

if TYPE_CHECKING:
    from engine.executor.ranks.ranks import Ranks


@dataclass(slots=True, weakref_slot=True, eq=False)
class StartedModel:
    """A loaded model; see `engine.core.executor.LoadedModel`.

    Attributes:
        runner: Of this process, rank 0.
        executor: Runs steps on all ranks.
        ranks: The others; None for a single rank.
    """

    runner: ModelRunner
    executor: Executor
    ranks: Ranks | None
    facts: ModelFacts
    fatal: tuple[type[Exception], ...] = (torch.AcceleratorError, EngineDeadError)

    @property
    def num_compilations(self) -> int:
        return self.runner.compilations.count

    def progress(self) -> tuple[int, ...] | None:
        # A rank may stand still because another one does.
        return self.runner.progress() if self.ranks is None else None

    def check(self) -> None:
        if self.ranks is not None:
            self.ranks.check()

    def close(self) -> None:
        if self.ranks is not None:
            self.ranks.close()


def start_model(config: EngineConfig, path: Path) -> StartedModel:
    """Loads a model on as many ranks as the configuration says.

    Args:
        path: A directory or .gguf file, as `resolve_model` returns it.

    Raises:
        ConfigError, CheckpointError: It cannot be loaded as asked.
        EngineError: A rank could not start.
    """
    checkpoint = open_model(path, config.load_format)
    ranks: Ranks | None = None
    with caching_in(config.cache_dir):
        if config.num_ranks == 1:
            runner = ModelRunner(config, checkpoint)
            executor: Executor = runner
        else:
            # One rank needs no messages, nor the packages that carry them.
            from engine.executor.ranks.ranks import launch

            runner, executor, ranks = launch(config, checkpoint, path)
    facts = ModelFacts(
        max_model_len=runner.plan.max_model_len,
        vocab_size=runner.model_config.vocab_size,
        hidden_size=runner.model_config.hidden_size,
        num_blocks=runner.plan.num_blocks,
        block_size=runner.plan.block_size,
        num_bytes=runner.model.num_bytes,
        device_type=runner.device.type,
        is_asynchronous=runner.is_asynchronous,
        is_chunk_invariant=runner.is_chunk_invariant,
        cache_salt=runner.cache_salt,
        recommended_params=checkpoint.recommended_params,
        memory_plan=str(runner.plan),
        # A GPU's is planned from activations that are measured, which a size that is given is not.
        num_cache_bytes=runner.plan.kv_cache if runner.device.type == "cpu" else None,
    )
    started = StartedModel(runner, executor, ranks, facts)
    if ranks is not None:
        # At the latest with the program.
        weakref.finalize(started, ranks.close)
    return started


def start_engine(
    config: EngineConfig, path: Path, eos_token_ids: Collection[int]
) -> EngineCore[StartedModel]:
    """A step loop over a model that it loads.

    Args:
        eos_token_ids: Tokens that end a sequence.

    Raises:
        ConfigError, CheckpointError, EngineError: As `start_model`; nothing is left behind.
    """
    return run_model(config, start_model(config, path), eos_token_ids)


def run_model(
    config: EngineConfig, model: StartedModel, eos_token_ids: Collection[int]
) -> EngineCore[StartedModel]:
    """A step loop over a loaded model, which is closed where there cannot be one.

    Raises:
        CheckpointError: As `EngineCore`.
    """
    try:
        return EngineCore(config, model, eos_token_ids)
    except BaseException:
        model.close()
        raise
