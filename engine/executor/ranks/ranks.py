"""Ranks: the other processes of an engine whose layers are shared, as rank 0 sees them.

Rank 0 schedules. What it is about to run goes to all ranks in one message a step and half of it, the batch before the
forward pass and the draws before sampling, and every rank does the same with its share of the model: exchanges of
tensors need no other order. Each draws every token itself, and says what came of it: a rank that does not agree, that
falls silent or ends is named, and all of them are ended with it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import os
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import zmq

import engine.errors
from engine.config import EngineConfig
from engine.core.batch import Batch, Draw
from engine.core.executor import Executor, Sampled
from engine.core.request import RowResult
from engine.errors import EngineDeadError, EngineError, RankFailedError
from engine.executor.options import resolve_device
from engine.executor.ranks.agreement import Standing, awaited, digest_of
from engine.executor.ranks.launching import Launcher, Link, ProcessLauncher, RankHandle
from engine.executor.ranks.limits import BEAT_SECONDS, Limits
from engine.executor.ranks.messages import (
    Beat,
    Done,
    Execute,
    FromRank,
    RankFailed,
    RankHere,
    RankReady,
    RankSays,
    RankStart,
    Sample,
    ToRank,
    encode,
    from_rank_decoder,
)
from engine.executor.runner import ModelRunner
from engine.installation import missing_package
from engine.loading.checkpoint import Checkpoint
from engine.parallel.pipeline import waiting_for_device
from engine.parallel.place import RankPlace
from engine.parallel.waiting import WaitRecord
from engine.process import ProcessClock, RunningClock

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.25
"""How often the watcher looks at ranks that say nothing."""

GRACE_SECONDS = 5.0
"""How long a process may take to end that was told to, or killed."""

Result = TypeVar("Result")


@dataclasses.dataclass(slots=True)
class _Rank:
    """
    Attributes:
        clock: The time in which its process could have got on.
        last_heard: On that clock.
        standing: As in its last `Beat`.
    """

    orders: zmq.Socket[bytes]
    link: Link
    clock: ProcessClock
    process: RankHandle | None = None
    last_heard: float = 0.0
    is_told: bool = False
    is_here: bool = False
    is_ready: bool = False
    beats: bool = False
    last_done: int = 0
    standing: Standing = Standing("its start")


@dataclasses.dataclass(slots=True)
class _Step:
    """A step that not all ranks have finished.

    Attributes:
        deadline: On a clock that goes as the slowest of the ranks'.
        digests: What each rank that has finished it said came of it.
    """

    num_tokens: int
    seconds: float
    deadline: float
    is_sampled: bool = False
    digests: dict[int, bytes] = dataclasses.field(default_factory=dict)


class Ranks:
    """Starts ranks 1 … size - 1, speaks to them, and watches over them.

    A thread of its own owns their processes from start to end. Of what it learns of a failure the surest counts:
    that a process has ended, then what a rank has reported, since those that exchange with one that is dead report
    failures, too.

    Args:
        path: Of the model.
        launcher: Says where and how; is closed with the ranks.

    Attributes:
        store: Where the groups of all ranks meet.
        num_bytes: Of the weights of a rank, for the limit of a step.
        record: Says for whom rank 0 waits.
        failure: Why the ranks were ended.
    """

    def __init__(
        self, config: EngineConfig, path: Path, size: int, launcher: Launcher, limits: Limits | None = None
    ) -> None:
        self.failure: EngineError | None = None
        self.num_bytes = 0
        self.record = WaitRecord()
        self._limits = Limits() if limits is None else limits
        self._changed = threading.Condition()
        self._clock = RunningClock(2 * BEAT_SECONDS)
        self._own_clock = ProcessClock(os.getpid(), 2 * BEAT_SECONDS)
        self._clock_seconds = [0.0] * size
        self._step_seconds = 0.0
        self._step, self._thread = 0, threading.get_ident()
        self._steps: dict[int, _Step] = {}
        self._stage_size = config.tensor_parallel_size
        # What the last of several stages drew, by step, until rank 0 asks for it.
        self._drawn: dict[int, list[RowResult]] = {}
        # The first report of a failure, and when it is believed.
        self._reported: tuple[EngineError, float] | None = None
        self._launcher, self.store = launcher, launcher.store
        self._context = zmq.Context()
        try:
            self._reports = self._socket(zmq.PULL)
            reports = launcher.bind(self._reports, "reports")
            self._ranks: dict[int, _Rank] = {}
            for rank in range(1, size):
                orders = self._socket(zmq.PUSH)
                clock = ProcessClock(None, 2 * BEAT_SECONDS)
                self._ranks[rank] = _Rank(orders, launcher.bind(orders, f"rank-{rank}"), clock)
        except BaseException:
            self._context.destroy(linger=0)
            launcher.close()
            raise
        options = dataclasses.asdict(config)
        starts = {
            rank: encode(RankStart(options=options, path=str(path), rank=rank, store=self.store))
            for rank in self._ranks
        }
        self._watcher = threading.Thread(target=self._watch, args=(reports, starts), daemon=True)
        self._watcher.start()

    def wait_until_here(self) -> None:
        """Waits until the ranks are about to join the groups: from then on they can be waited for there.

        Raises:
            EngineError: What a rank could not start for.
        """
        self._wait(lambda: all(rank.is_here for rank in self._ranks.values()))

    def attend(self, wait: Callable[[], Result]) -> Result:
        """The result of a function that waits for the ranks and cannot be interrupted; waits only while they live.

        Raises:
            EngineError: What a rank could not start for. The function is left to itself.
        """
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(wait())
            except BaseException as error:
                errors.append(error)
            with self._changed:
                self._changed.notify_all()

        threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or results or errors)
        if errors and self.failure is None:
            raise self.cause_of(errors[0]) from errors[0]
        self.check()
        return results[0]

    def wait_until_ready(self) -> None:
        """Waits until the ranks have loaded their shares.

        Raises:
            EngineError: What a rank could not start for.
        """
        self._wait(lambda: all(rank.is_ready and rank.beats for rank in self._ranks.values()))
        self._launcher.settle()

    def begin(self, batch: Batch) -> bytes:
        """Has the ranks run a step; what they were told."""
        with self._changed:
            if self._step in self._steps and not self._steps[self._step].is_sampled:
                del self._steps[self._step]  # nobody wanted more than its logits
            self._step, self._thread = self._step + 1, threading.get_ident()
            # It may wait for those before it.
            num_tokens = batch.num_tokens + sum(step.num_tokens for step in self._steps.values())
            seconds = self._limits.of_step(num_tokens, self.num_bytes)
            self._steps[self._step] = _Step(batch.num_tokens, seconds, self._step_seconds + seconds)
        return self._order(Execute(self._step, batch))

    def sample(self, draws: list[Draw | None]) -> int:
        """Has them draw its tokens; the step's number."""
        self._steps[self._step].is_sampled = True
        self._order(Sample(self._step, draws))
        return self._step

    def finish(self, step: int, digest: bytes) -> None:
        """Notes what came of a step on rank 0."""
        self._note(0, step, digest)

    def drawn(self, step: int) -> list[RowResult]:
        """Waits for what the last stage drew in a step.

        Raises:
            EngineError: The ranks were ended, and why.
        """
        first_of_last_stage = len(self._ranks) + 1 - self._stage_size
        with self.record.waiting((first_of_last_stage,), "tokens"):
            self._wait(lambda: step in self._drawn)
        return self._drawn.pop(step)

    def check(self) -> None:
        """
        Raises:
            EngineError: The ranks were ended, and why.
        """
        if self.failure is not None:
            raise self.failure

    def cause_of(self, error: BaseException) -> EngineError:
        """Why rank 0 failed: of its own, or because of another one; all are ended."""
        self._report(0, self._step, type(error).__name__, str(error))
        with self._changed:
            # The watcher decides; it is not waited for forever should it be stuck in ending a process.
            self._changed.wait_for(lambda: self.failure is not None, self._limits.settle + GRACE_SECONDS)
        return self.failure or EngineDeadError(f"rank 0 failed {self._when(0)}: {error}")

    def interrupt(self, error: BaseException) -> None:
        """Ends the ranks, which are in the middle of a step that rank 0 does not finish."""
        self._fail(RankFailedError(f"rank 0 was interrupted at step {self._step} by {type(error).__name__}"))

    def close(self) -> None:
        """Ends the ranks, and leaves nothing behind. May be called twice, and while a step waits for them."""
        self._fail(EngineDeadError("the engine was closed"))
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        self._context.destroy(linger=0)
        self._launcher.close()

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        return socket

    def _order(self, message: ToRank) -> bytes:
        """
        Raises:
            EngineError: A rank has gone.
        """
        data = encode(message)
        for number, rank in self._ranks.items():
            try:
                # A socket without its other end would wait for one forever.
                rank.orders.send(data, zmq.NOBLOCK)
            except zmq.ZMQError as error:
                raise self.cause_of(ConnectionError(f"rank {number} has left")) from error
        return data

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or condition())
        self.check()

    def _watch(self, reports: Link, starts: dict[int, bytes]) -> None:
        try:
            # A child of this thread: it must not go with another that somebody starts an engine in and ends.
            for number, rank in self._ranks.items():
                rank.process = self._launcher.start(number, rank.link, reports)
                rank.clock = ProcessClock(rank.process.process_id, 2 * BEAT_SECONDS)
            while self.failure is None:
                self._tell(starts)
                self._listen()
                self._judge()
        except Exception as error:
            # Whatever it is, those who wait for ranks would wait forever.
            traceback.print_exc()
            self._fail(RankFailedError(f"the watch over the ranks failed: {type(error).__name__}: {error}"))
        processes = [rank.process for rank in self._ranks.values() if rank.process is not None]
        for process in processes:
            process.kill()
        for process in processes:
            process.release()
        for process in processes:
            process.end(GRACE_SECONDS)

    def _tell(self, starts: dict[int, bytes]) -> None:
        """Tells the ranks that have come what they are to be."""
        for number, rank in self._ranks.items():
            if not rank.is_told:
                with contextlib.suppress(zmq.Again):
                    rank.orders.send(starts[number], zmq.NOBLOCK)
                    rank.is_told = True

    def _listen(self) -> None:
        timeout = int(1000 * WATCH_SECONDS)
        while self.failure is None and self._reports.poll(timeout):
            self._take(from_rank_decoder.decode(self._reports.recv()))
            timeout = 0

    def _judge(self) -> None:
        self._clock.tick()
        self._own_clock.tick()
        for number, rank in self._ranks.items():
            assert rank.process is not None
            rank.clock.tick()
            cause = rank.process.poll()
            if cause is not None:
                self._fail(RankFailedError(f"rank {number} {cause} {self._when(number)}"))
            limit = self._limits.silence if rank.is_ready else self._limits.start
            if rank.clock.seconds - rank.last_heard > limit:
                self._fail(
                    RankFailedError(f"rank {number} has been silent for {limit:g} s {self._when(number)}")
                )
        if self._reported is not None and self._clock.seconds > self._reported[1]:
            self._fail(self._reported[0])
        # Each waits for the slowest.
        clocks = [self._own_clock, *(rank.clock for rank in self._ranks.values())]
        before, self._clock_seconds = self._clock_seconds, [clock.seconds for clock in clocks]
        self._step_seconds += min(now - then for now, then in zip(self._clock_seconds, before, strict=True))
        with self._changed:
            overdue = [
                (number, step) for number, step in self._steps.items() if self._step_seconds > step.deadline
            ]
        for number, step in overdue:
            self._judge_step(number, step)

    def _judge_step(self, number: int, step: _Step) -> None:
        """Names the ranks that a step waits for: of those that are late, the ones that do not wait themselves."""
        late = {rank: state.standing for rank, state in self._ranks.items() if state.last_done < number}
        # One that has no order waits for rank 0, and is not late by itself.
        begun = [rank for rank, standing in late.items() if standing.kind != "order"]
        if 0 not in step.digests:
            late[0] = Standing.of(self.record, self._thread)
        stuck = {rank: late[rank] for rank in awaited(begun, {rank: late[rank].ranks for rank in late})}
        if not stuck:
            return
        ranks = " and ".join(map(str, stuck))
        places = " and ".join(standing.place for standing in stuck.values())
        waits = ", ".join(f"rank {rank} {standing}" for rank, standing in stuck.items() if standing.ranks)
        how = "they wait for each other" if len(stuck) > 1 else "it waits in vain"
        self._fail(
            RankFailedError(
                f"rank {ranks} has not finished step {number} of {step.num_tokens} tokens "
                f"within {step.seconds:.3g} s; now at {places}" + (f"; {how}: {waits}" if waits else "")
            )
        )

    def _take(self, message: FromRank) -> None:
        rank = self._ranks[message.rank]
        rank.last_heard = rank.clock.seconds
        match message:
            case RankHere():
                rank.is_here = True
            case RankSays(_, line):
                logger.info("%s", line)
            case RankReady():
                rank.is_ready = True
            case Beat(_, standing):
                rank.beats, rank.standing = True, standing
            case Done(number, step, digest, results):
                rank.last_done = step
                if results is not None:
                    self._drawn[step] = [one.result() for one in results]
                self._note(number, step, digest)
            case RankFailed(number, step, kind, text):
                self._report(number, step, kind, text)
        with self._changed:
            self._changed.notify_all()

    def _report(self, rank: int, step: int, kind: str, text: str) -> None:
        """Notes what a rank says that it failed with; the first is believed, if none of them has died of it."""
        error = getattr(engine.errors, kind, None)
        failure: EngineError
        if step == 0 and isinstance(error, type) and issubclass(error, EngineError):
            failure = error(f"rank {rank}: {text}")
        else:
            when = f"at step {step}" if step else "while it started"
            failure = RankFailedError(f"rank {rank} failed {when}: {kind}: {text}")
        with self._changed:
            if self._reported is None:
                self._reported = failure, self._clock.seconds + self._limits.settle

    def _note(self, rank: int, number: int, digest: bytes) -> None:
        with self._changed:
            step = self._steps.get(number)
            if step is None:
                return
            step.digests[rank] = digest
            if len(step.digests) <= len(self._ranks):
                return
            del self._steps[number]
        for first in range(0, len(step.digests), self._stage_size):
            stage = {rank: step.digests[rank] for rank in range(first, first + self._stage_size)}
            if len(set(stage.values())) > 1:
                self._fail(RankFailedError(f"{_dissent(stage)} on what came of step {number}"))

    def _when(self, number: int) -> str:
        """Where a rank stands."""
        if number and not self._ranks[number].is_ready:
            return "while it started"
        running = min(self._steps, default=None)
        return f"after step {self._step}" if running is None else f"at step {running}"

    def _fail(self, failure: EngineError) -> None:
        with self._changed:
            if self.failure is None:
                self.failure = failure
                # An exchange that waits for any of them fails now.
                for rank in self._ranks.values():
                    if rank.process is not None:
                        rank.process.kill()
            self._changed.notify_all()


def _dissent(digests: dict[int, bytes]) -> str:
    """Which ranks disagree with which: those that are not of the opinion of most."""
    (opinion, votes), *_ = Counter(digests.values()).most_common()
    if 2 * votes <= len(digests):
        return f"ranks {' and '.join(map(str, sorted(digests)))} disagree"
    dissenters = [str(rank) for rank in sorted(digests) if digests[rank] != opinion]
    verb = "disagrees" if len(dissenters) == 1 else "disagree"
    return f"rank {' and '.join(dissenters)} {verb} with the others"


class LeadingRunner:
    """Rank 0's runner, which takes the other ranks with it; see `engine.executor.runner.Executor`."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self._runner, self._ranks = runner, ranks
        self._order = b""

    def execute(self, batch: Batch) -> torch.Tensor:
        """
        Raises:
            EngineError: A rank failed, and all were ended.
        """
        self._ranks.check()
        with _together(self._ranks):
            self._order = self._ranks.begin(batch)
            return self._runner.execute(batch)

    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """
        Raises:
            EngineError: A rank failed, and all were ended.
        """
        with _together(self._ranks):
            step = self._ranks.sample(draws)
            if not self._runner.place.pipeline.is_last:
                return _Awaited(self._order, step, self._ranks)
            sampled = self._runner.sample(logits, batch, draws)
            return _Compared(sampled, self._order, step, self._ranks, self._runner.place)


@dataclasses.dataclass(frozen=True, slots=True)
class _Compared:
    """A step's tokens, which are compared with those of the other ranks when they are read."""

    sampled: Sampled
    order: bytes
    step: int
    ranks: Ranks
    place: RankPlace

    def read(self) -> list[RowResult]:
        with _together(self.ranks):
            with waiting_for_device(self.place.group, self.place.pipeline):
                drawn = self.sampled.read()
            self.ranks.finish(self.step, digest_of(self.order, drawn))
            return drawn


@dataclasses.dataclass(frozen=True, slots=True)
class _Awaited:
    """A step's tokens, which the last stage draws."""

    order: bytes
    step: int
    ranks: Ranks

    def read(self) -> list[RowResult]:
        with _together(self.ranks):
            self.ranks.finish(self.step, digest_of(self.order, []))
            return self.ranks.drawn(self.step)


@contextlib.contextmanager
def _together(ranks: Ranks) -> Iterator[None]:
    """A step of rank 0 with the others is done whole, or all of them are ended.

    Raises:
        EngineError: Why they were.
    """
    try:
        yield
    except EngineDeadError:
        raise
    except Exception as error:
        raise ranks.cause_of(error) from error
    except BaseException as error:
        ranks.interrupt(error)
        raise


def launch(
    config: EngineConfig,
    checkpoint: Checkpoint,
    path: Path,
    limits: Limits | None = None,
    launcher: Launcher | None = None,
) -> tuple[ModelRunner, Executor, Ranks]:
    """Loads the model on several ranks: rank 0's runner, what runs steps, and the other ranks.

    Args:
        launcher: Of the other ranks; by default what the configuration says.

    Raises:
        EngineError: It cannot be loaded, on whichever rank.
    """
    ranks = Ranks(config, path, config.num_ranks, launcher or _launcher(config), limits)
    try:
        ranks.wait_until_here()
        runner = ModelRunner(config, checkpoint, 0, ranks.store, ranks.attend, record=ranks.record)
        if runner.device.type == "cpu":
            runner.place.group.check = ranks.check
        ranks.num_bytes = runner.model.num_bytes
        ranks.wait_until_ready()
    except Exception as error:
        # What it was refused for, or what others have died of: then this is what came of it.
        failure = error if isinstance(error, EngineError) else ranks.cause_of(error)
        ranks.close()
        raise failure from (None if failure is error else error)
    except BaseException:
        ranks.close()
        raise
    return runner, LeadingRunner(runner, ranks), ranks


def _launcher(config: EngineConfig) -> Launcher:
    """
    Raises:
        ConfigError: Ray is asked for, and is not installed, not started or too small.
    """
    if config.distributed_executor_backend == "mp":
        return ProcessLauncher()
    try:
        from engine.executor.ranks.ray_ranks import RayLauncher
    except ModuleNotFoundError as error:
        raise missing_package(error, "ray") from error
    return RayLauncher(config.num_ranks, config.tensor_parallel_size, resolve_device(config).type)
