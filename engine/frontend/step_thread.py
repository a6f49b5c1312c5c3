"""StepThread: the steps of an engine in this process, for calls of any number of threads.

Steps run in a thread of their own, which no signal interrupts: whoever waits for results may be interrupted at any
moment (Ctrl-C in a notebook), and what the engine knows stays whole. Calls that are open at a time share batches. The
thread is there while there is work.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from engine.core.engine_core import EngineCore
from engine.core.request import EngineOutput, Request
from engine.errors import EngineDeadError, EngineError
from engine.process import RestartLimit

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""How often a progress bar is moved."""


class Processor(Protocol):
    """Makes what a caller gets of what the engine brings of one request: something with a `finished`, or None."""

    stopped_samples: list[int]

    def process(self, output: EngineOutput) -> Any: ...


@dataclass(slots=True, eq=False)
class Call:
    """The requests of one caller.

    Attributes:
        processors, extend: By request id, what makes a caller's outputs; and takes what it has made.
        resumed: What a request, by its id, has got so far; see `Request.resumed_token_ids`.
        num_tokens, num_finished: So far.
        done: Set once all requests have finished, or none will.
        error: What ended the call.
    """

    requests: list[Request]
    processors: Mapping[str, Processor]
    extend: Callable[[Any], None]
    resumed: Callable[[str], list[list[int] | None]]
    num_tokens: int = 0
    num_finished: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class StepThread:
    """Runs steps as long as calls are open.

    Args:
        restart: Makes another engine in the place of one that has lost a rank.
        limit: How often.

    Attributes:
        core: The engine.
    """

    def __init__(
        self, core: EngineCore[Any], restart: Callable[[], EngineCore[Any]], limit: RestartLimit
    ) -> None:
        self.core = core
        self._restart, self._limit = restart, limit
        self._is_closed = False
        # Why there is no engine any more.
        self._ended: EngineError | None = None
        self._lock = threading.Lock()
        self._arrived: deque[Call] = deque()
        self._cancelled: deque[Call] = deque()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Closes the engine, which is not started again."""
        self._is_closed = True
        if hasattr(self.core, "model"):
            self.core.close()

    def run(self, call: Call, progress: Callable[[Call], None]) -> None:
        """Returns when all requests of the call have finished.

        Whatever interrupts it, its requests are aborted, and the engine goes on with those of others.

        Raises:
            Exception: What ended the engine, or a step that no row can be blamed for.
        """
        try:
            with self._lock:
                self._arrived.append(call)
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="engine steps")
                    self._thread.start()
            while not call.done.wait(POLL_SECONDS):
                progress(call)
            progress(call)
        finally:
            if not call.done.is_set():
                self._cancelled.append(call)
        if call.error is not None:
            raise call.error

    def _run(self) -> None:
        open_calls: dict[str, Call] = {}
        while True:
            with self._lock:
                arrived = list(self._arrived)
                self._arrived.clear()
                if not arrived and not self.core.has_work:
                    self._thread = None
                    return
            problem: BaseException | None = None
            try:
                for call in arrived:
                    open_calls |= dict.fromkeys(call.processors, call)
                if self._ended is not None:
                    raise self._ended
                for request in [request for call in arrived for request in call.requests]:
                    self.core.add_request(request)
                while self._cancelled:
                    for request_id in self._cancelled.popleft().processors:
                        self.core.abort(request_id)
                        open_calls.pop(request_id, None)
                if self.core.has_work:
                    self._step(open_calls)
            except BaseException as error:
                problem = error
            # Outside: while an error is handled, its stack keeps what it was amid.
            while problem is not None:
                problem = self._recover(problem, open_calls)

    def _recover(self, error: BaseException, open_calls: dict[str, Call]) -> BaseException | None:
        """Has what is open go on where it can, and ends it otherwise. Returns what went wrong amid that."""
        is_lost = isinstance(error, EngineDeadError)
        if not is_lost or self._is_closed or self._ended is not None or not self._limit.allows_another():
            if isinstance(error, EngineError) and (is_lost or not hasattr(self.core, "model")):
                self._ended = self._ended or error
            # Nobody knows how far the step came: what was open ends with it, and the next call finds nothing.
            try:
                self.core.reset()
            finally:
                for call in set(open_calls.values()):
                    call.error = error
                    call.done.set()
                open_calls.clear()
            return None
        logger.error("%s; starting again, %d requests are open", error, len(open_calls))
        try:
            grammars = self.core.grammars
            self.core.close()
            # Its weights and its cache make room for the next one's.
            traceback.clear_frames(error.__traceback__)
            del self.core.model
            self.core = self._restart()
            if grammars.vocabulary is not None:
                self.core.grammars.vocabulary = grammars.vocabulary
            for call in set(open_calls.values()):
                for request in call.requests:
                    if request.request_id in open_calls:
                        resumed = call.resumed(request.request_id)
                        self.core.add_request(replace(request, resumed_token_ids=resumed))
        except BaseException as another:
            return another
        return None

    def _step(self, open_calls: dict[str, Call]) -> None:
        for output in self.core.step():
            call = open_calls.get(output.request_id)
            if call is None:
                continue  # of a call that is no longer waited for
            processor = call.processors[output.request_id]
            addition = processor.process(output)
            for index in processor.stopped_samples:
                self.core.abort(output.request_id, index)
            processor.stopped_samples.clear()
            if addition is None:
                continue
            call.extend(addition)
            call.num_tokens += len(output.tokens)
            if addition.finished:
                call.num_finished += 1
                del open_calls[output.request_id]
                if call.num_finished == len(call.processors):
                    call.done.set()
