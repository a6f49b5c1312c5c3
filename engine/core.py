"""EngineCore: the step loop, schedule → execute → sample → update. Runs in the caller's process."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.batch import Batch
from engine.config import EngineConfig, SchedulerConfig
from engine.errors import CheckpointError
from engine.kv_cache import BlockPool, KVCacheManager
from engine.loading.checkpoint import open_checkpoint
from engine.metrics import EngineInfo, EngineStats
from engine.request import EngineOutput, Request, RowFailure, SampledToken
from engine.runner import ModelRunner
from engine.sampling.params import SamplingParams
from engine.scheduler import Scheduler

SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The keys of generation_config.json that are sampling parameters here too."""


class EngineCore:
    """Scheduler, cache and model of one engine.

    Args:
        path: A directory or .gguf file, as `resolve_model` returns it.
        eos_token_ids: Tokens that end a sequence.
    """

    def __init__(self, config: EngineConfig, path: Path, eos_token_ids: Collection[int]) -> None:
        checkpoint = open_checkpoint(path)
        self.runner = ModelRunner(config, checkpoint)
        plan = self.runner.plan
        self.scheduler = Scheduler(
            SchedulerConfig.resolve(config, plan.max_model_len, self.runner.device.type),
            KVCacheManager(BlockPool(plan.num_blocks + 1), plan.block_size),
            eos_token_ids,
            self.runner.cache_salt,
            config.enable_prefix_caching,
        )
        self.info = EngineInfo(
            max_model_len=plan.max_model_len,
            vocab_size=self.runner.model_config.vocab_size,
            default_params=_default_params(checkpoint.generation_config),
            memory_plan=str(plan),
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats

    def add_request(self, request: Request) -> None:
        """Queues a request that `validate_request` has passed."""
        self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one sample of it; its blocks are free for the next step."""
        self.scheduler.abort(request_id, index)

    def step(self) -> list[EngineOutput]:
        """Plans and runs one step; call while there is work."""
        batch = self.scheduler.schedule()
        assert batch.rows, "the scheduler has work but planned none of it"
        return self.scheduler.update(self._run(batch))

    def _run(self, batch: Batch) -> list[SampledToken | RowFailure | None]:
        try:
            return self.runner.sample(self.runner.execute(batch), batch)
        except torch.AcceleratorError:
            raise  # the device is lost, not a row
        except Exception as error:
            if len(batch.rows) == 1:
                return [RowFailure(f"{type(error).__name__}: {error}")]
            # One row spoils the step: run each by itself to find it. Rows do not read each other's blocks
            # before `update`, and writing a key twice writes the same.
            return [result for row in batch.rows for result in self._run(Batch([row]))]


def _default_params(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters among generation_config.json's keys, of the types that SamplingParams has.

    Raises:
        CheckpointError: A value that no request could have either.
    """
    given = {
        key: generation_config[key] for key in SAMPLING_DEFAULTS if generation_config.get(key) is not None
    }
    try:
        params = msgspec.convert(given, SamplingParams, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise CheckpointError(f"generation_config.json: {error}") from error
    return {key: getattr(params, key) for key in given}
