"""The engine process: `python -m engine.frontend.engine_process ADDRESS BEATS`, which only AsyncEngine starts.

It is rank 0. Lives as long as its parent: the parent holds the other end of standard input, and its end is the signal
to go. A thread of its own tells the parent each second that the process lives, ends it where the engine has failed
while nobody steps it, and where a step takes too long.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import zmq

from engine import logs
from engine.cache_directory import cache_directory, caching_in
from engine.config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.core.request import EngineOutput
from engine.core.scheduler import Scheduler
from engine.errors import EngineError
from engine.executor.ranks.limits import BEAT_SECONDS, Limits
from engine.frontend.messages import (
    Abort,
    Add,
    Alive,
    Died,
    EndTokens,
    GetTrace,
    Learn,
    Outputs,
    Ready,
    Start,
    StartFailed,
    Traced,
    encode,
    to_engine_decoder,
)
from engine.frontend.progress_page import ProgressPage
from engine.process import ProcessClock, follow_parent, whereabouts

FLUSH_MILLISECONDS = 1000
"""How long the last messages of a process that ends may take to leave it."""


def main(address: str, beats: str, limits: Limits | None = None) -> int:
    """Connects to the parent, loads the model, and steps until told to stop. Returns the exit status of a failure."""
    follow_parent()
    # A service manager may signal every process it knows; the parent decides what that means.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure(os.environ.get("ENGINE_LOG_FORMAT"))
    # What a start makes stays: looking through it for garbage, again and again, takes a tenth of the time.
    gc.disable()
    progress = Progress(Limits() if limits is None else limits)
    threading.Thread(target=_beat, args=(beats, progress), daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)
        socket.connect(address)
        try:
            page = ProgressPage(Path(f"{address.removeprefix('ipc://')}-page"))
            core = _load(socket, address)
        except Exception as error:
            if not isinstance(error, EngineError):
                traceback.print_exc()
            socket.send(encode(StartFailed(type(error).__name__, str(error))))
            return 1
        gc.freeze()
        gc.enable()
        progress.watch(core, page)
        socket.send(encode(Ready(core.info, core.stats)))
        try:
            _run(core, socket, progress)
        except EngineError as error:
            socket.send(encode(Died(str(error))))
        except Exception as error:
            traceback.print_exc()
            step, kind = core.scheduler.num_steps, type(error).__name__
            socket.send(encode(Died(f"rank 0 failed at step {step}: {kind}: {error}")))
        core.close()
        return 1


class Progress:
    """What the main thread is at, as another one sees it."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._main = limits, threading.get_ident()
        self._clock = ProcessClock(os.getpid(), 2 * BEAT_SECONDS)
        self._core: EngineCore[Any] | None = None
        self._num_steps, self._is_stepping = 0, False
        self._page: ProgressPage | None = None
        # Of the steps in flight.
        self._num_tokens = 0
        # The step that was seen last, and when; what it was at, and since when.
        self._seen = 0, 0.0
        self._task: tuple[tuple[int, ...] | None, float] = None, 0.0

    def watch(self, core: EngineCore[Any], page: ProgressPage) -> None:
        """Watches an engine's ranks and steps from now on.

        Args:
            page: Where the parent finds which requests a step is of.
        """
        self._core, self._page = core, page
        core.on_plan = self._note

    def _note(self, scheduler: Scheduler) -> None:
        assert self._page is not None
        self._page.write(scheduler.requests_in_flight())
        self._num_tokens = scheduler.num_tokens_in_flight()

    def step(self) -> list[EngineOutput]:
        """Has the engine make a step."""
        assert self._core is not None
        self._num_steps += 1
        self._is_stepping = True
        outputs = self._core.step()
        self._is_stepping = False
        return outputs

    @property
    def starved_seconds(self) -> float:
        """Time in which this process was ready to run, and other programs had the CPUs."""
        return self._clock.starved_seconds

    def close(self) -> None:
        """Ends the engine's other processes, if they have been started."""
        if self._core is not None:
            self._core.close()

    def trouble(self) -> str | None:
        """Why the engine cannot go on; asked each second."""
        now, core = self._clock.tick(), self._core
        if core is None:
            return None
        try:
            core.check()
        except EngineError as error:
            return str(error)
        number, since = self._seen
        task, task_since = self._task
        at = core.model.progress()
        if not self._is_stepping or number != self._num_steps:
            self._seen, self._task = (self._num_steps, now), (at, now)
            return None
        num_tokens = self._num_tokens
        if at != task:
            self._task = at, now
        elif at is not None and now - task_since > self._limits.task:
            return self._stuck(num_tokens, f"has not got on for {self._limits.task:.3g} s in")
        # Where other ranks are late, those who watch them say so a little earlier, and can name them.
        seconds = self._limits.of_step(num_tokens, core.model.facts.num_bytes) + self._limits.silence
        # Who takes one task after the other is slow, and not stuck.
        if at is not None or now - since <= seconds:
            return None
        return self._stuck(num_tokens, "has not finished", f" within {seconds:.3g} s")

    def _stuck(self, num_tokens: int, what: str, how_long: str = "") -> str:
        assert self._core is not None
        return (
            f"rank 0 {what} step {self._core.scheduler.num_steps} of {num_tokens} tokens{how_long}; "
            f"now at {whereabouts(self._main)[0]}"
        )


def _beat(address: str, progress: Progress) -> None:
    """Says that the process lives, and ends it where the main thread cannot."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, FLUSH_MILLISECONDS)
        socket.connect(address)
        trouble = None
        while trouble is None:
            # A parent that does not listen, being stopped, needs no more of them.
            with contextlib.suppress(zmq.Again):
                socket.send(encode(Alive()), zmq.NOBLOCK)
            time.sleep(BEAT_SECONDS)
            trouble = progress.trouble()
        with contextlib.suppress(zmq.Again):
            socket.send(encode(Died(trouble)), zmq.NOBLOCK)
    progress.close()
    os._exit(1)


def _load(socket: zmq.Socket[bytes], address: str) -> EngineCore[Any]:
    # It brings torch, which takes seconds: the thread that says this process lives is there first, and the parent
    # reads the vocabulary meanwhile.
    from engine.executor.start import run_model, start_model

    message = to_engine_decoder.decode(socket.recv())
    assert isinstance(message, Start)
    config = EngineConfig(**message.options)
    # What is left of a start that is cut off lies where the parent takes it away; what is kept lies elsewhere.
    with caching_in(config.cache_dir or str(cache_directory())):
        tempfile.tempdir = str(Path(address.removeprefix("ipc://")).parent)
        try:
            model = start_model(config, Path(message.path))
        finally:
            tempfile.tempdir = None
    ends = to_engine_decoder.decode(socket.recv())
    assert isinstance(ends, EndTokens)
    return run_model(config, model, ends.eos_token_ids)


def _run(core: EngineCore[Any], socket: zmq.Socket[bytes], progress: Progress) -> None:
    """Takes in messages between steps; waits for one, without spinning, when there is nothing to do."""
    while True:
        while not core.has_work or socket.poll(0):
            match to_engine_decoder.decode(socket.recv()):
                case Learn(vocabulary):
                    core.grammars.vocabulary = vocabulary
                case Add(request):
                    core.add_request(request)
                case Abort(request_id, index):
                    core.abort(request_id, index)
                    if not core.has_work:
                        socket.send(encode(Outputs([], core.stats)))
                case GetTrace(seconds):
                    socket.send(encode(Traced(core.scheduler.trace.last(seconds))))
        outputs = progress.step()
        stats = core.stats
        stats.starved_seconds = progress.starved_seconds
        socket.send(encode(Outputs(outputs, stats)))


if __name__ == "__main__":
    status = main(sys.argv[1], sys.argv[2])
    sys.stderr.flush()
    # What is left of the model and its groups takes seconds to go in order, and may wait for ranks that are no more.
    os._exit(status)
