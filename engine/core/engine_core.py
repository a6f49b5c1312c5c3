"""EngineCore: the step loop, schedule → execute → sample → update. Runs in the caller's process.

With overlap the next step is planned and its forward pass launched before the tokens of the last one are read:

    device   forward n │ sample n │ forward n+1          │ sample n+1 │ …
    host     … plan and launch n+1 │ read n, update │ launch sample n+1 │ plan and launch n+2 …

Sampling is launched after the update, so that penalties and grammars see every token before theirs.

With pipeline stages as many steps are in flight, of different sequences; see `engine.core.scheduler`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Generic, TypeVar

from engine.config import EngineConfig, SchedulerConfig
from engine.core.batch import Batch, Draw
from engine.core.executor import Drawn, LoadedModel, Logits, Sampled
from engine.core.grammar import Grammars
from engine.core.kv_cache import BlockPool, KVCacheManager
from engine.core.request import EngineOutput, Request, RowFailure, RowResult
from engine.core.sampling_params import SAMPLING_PARAMETERS, Parameter, SamplingParams
from engine.core.scheduler import Scheduler
from engine.core.stats import EngineInfo, EngineStats
from engine.errors import CheckpointError

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=LoadedModel)


class EngineCore(Generic[Model]):
    """Scheduler, cache and step loop of one engine, over a model that it is handed.

    Args:
        model: Loaded; is closed with the engine.
        eos_token_ids: Tokens that end a sequence.
        clock: Seconds, which steps take.

    Attributes:
        grammars: What keeps the forms of outputs; must know the tokenizer's vocabulary before the first of them.
        on_plan: Is called before a step runs that the scheduler has planned.

    Raises:
        CheckpointError: The model recommends sampling parameters that no request could have.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        eos_token_ids: Collection[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        facts = model.facts
        self.model = model
        self.grammars = Grammars(facts.vocab_size, eos_token_ids)
        self.scheduler = Scheduler(
            SchedulerConfig.resolve(config, facts.max_model_len, facts.device_type),
            KVCacheManager(BlockPool(facts.num_blocks + 1), facts.block_size),
            eos_token_ids,
            facts.cache_salt,
            config.enable_prefix_caching,
            self.grammars,
        )
        self.overlap = facts.is_asynchronous if config.overlap is None else config.overlap
        self.num_stages = config.pipeline_parallel_size
        self.on_plan: Callable[[Scheduler], None] | None = None
        self._clock = clock
        # With the time at which their planning began.
        self._in_flight: deque[tuple[Sampled, float]] = deque()
        self._collected = clock()
        self.info = EngineInfo(
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            hidden_size=facts.hidden_size,
            max_num_seqs=self.scheduler.config.max_num_seqs,
            default_params=_default_params(facts.recommended_params),
            memory_plan=facts.memory_plan,
            num_cache_bytes=facts.num_cache_bytes,
            identity=hashlib.blake2b(facts.cache_salt, digest_size=16).hexdigest(),
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def stats(self) -> EngineStats:
        return replace(self.scheduler.stats, num_kernel_compilations=self.model.num_compilations)

    def check(self) -> None:
        """
        Raises:
            RankFailedError: The engine has lost a rank.
        """
        self.model.check()

    def close(self) -> None:
        """Ends the engine's threads and other processes."""
        self.grammars.close()
        self.model.close()

    def add_request(self, request: Request) -> None:
        """Queues a request that `validate_request` has passed."""
        self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one sample of it; its blocks are free for the next step."""
        self.scheduler.abort(request_id, index)

    def reset(self) -> None:
        """Ends all requests, and forgets the steps in flight: for after a step that failed anywhere."""
        self.scheduler.reset()
        self._in_flight.clear()

    def step(self) -> list[EngineOutput]:
        """Plans and launches a step and takes in a finished one; call while there is work."""
        if self.num_stages > 1:
            return self._step_in_stages()
        began = self._clock()
        batch = self.scheduler.schedule()
        assert batch.rows or self._in_flight, "the scheduler has work but planned none of it"
        logits = self._execute(batch) if batch.rows else None
        outputs = self._collect()
        if batch.rows:
            self._in_flight.append((self._sample(batch, logits), began))
        return outputs if self.overlap else outputs + self._collect()

    def _step_in_stages(self) -> list[EngineOutput]:
        """Fills the stages with steps, and takes in the oldest."""
        while len(self._in_flight) < self.num_stages:
            began = self._clock()
            batch = self.scheduler.schedule()
            if not batch.rows:
                break
            self._in_flight.append((self._sample(batch, self._execute(batch)), began))
        assert self._in_flight, "the scheduler has work but planned none of it"
        return self._collect()

    def _collect(self) -> list[EngineOutput]:
        """Waits for the oldest step in flight, if there is one, and takes in what it drew."""
        if not self._in_flight:
            return []
        sampled, began = self._in_flight.popleft()
        results = sampled.read()
        # Steps that overlap take the time between their ends.
        since, self._collected = max(began, self._collected), self._clock()
        return self.scheduler.update(results, self._collected - since)

    def _execute(self, batch: Batch) -> Logits | None:
        """The batch's logits; None if a row spoils it."""
        if self.on_plan is not None:
            self.on_plan(self.scheduler)
        try:
            return self.model.executor.execute(batch)
        except self.model.fatal:
            raise
        except Exception as error:
            _log_failure(batch, error)
            return None

    def _sample(self, batch: Batch, logits: Logits | None) -> Sampled:
        draws = self.scheduler.draws()
        try:
            if logits is not None:
                return self.model.executor.sample(logits, batch, draws)
        except self.model.fatal:
            raise
        except Exception as error:
            _log_failure(batch, error)
        return Drawn(self._isolate(batch, draws))

    def _isolate(self, batch: Batch, draws: list[Draw | None]) -> list[RowResult]:
        """Runs each row by itself, to find the one that spoils the step.

        Rows do not read each other's blocks before `update`, and writing a key twice writes the same. The tokens that
        were pending are known by now, and the runner may have drawn others since.
        """
        results: list[RowResult] = []
        for row, draw in zip(self.scheduler.resolve(batch).rows, draws, strict=True):
            alone = Batch([row])
            try:
                results += self.model.executor.sample(
                    self.model.executor.execute(alone), alone, [draw]
                ).read()
            except self.model.fatal:
                raise
            except Exception as error:
                logger.warning("a row fails by itself, too: %s: %s", type(error).__name__, error)
                results.append(RowFailure(f"{type(error).__name__} in a step; the log has the details"))
        return results


def _log_failure(batch: Batch, error: Exception) -> None:
    logger.warning(
        "a step of %d rows failed, each now runs by itself: %s: %s",
        len(batch.rows),
        type(error).__name__,
        error,
    )


def _default_params(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters among generation_config.json's keys, of the types that SamplingParams has.

    Raises:
        CheckpointError: A value that no request could have either.
    """
    given = [
        parameter
        for parameter in SAMPLING_PARAMETERS
        if parameter.is_recommended and generation_config.get(parameter.name) is not None
    ]
    try:
        numbers = {
            parameter.name: _number(parameter, generation_config[parameter.name]) for parameter in given
        }
        params = SamplingParams(**numbers)
    except ValueError as error:
        raise CheckpointError(f"generation_config.json: {error}") from error
    return {name: getattr(params, name) for name in numbers}


def _number(parameter: Parameter, value: Any) -> Any:
    """The value as the type of the sampling parameter; files write 50.0 for 50."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or parameter.kind(value) != value:
        wanted = "an integer" if parameter.kind is int else "a number"
        raise ValueError(f"{parameter.name} must be {wanted}, got {value!r}")
    return parameter.kind(value)
