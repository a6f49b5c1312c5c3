"""StepThread: the steps of an engine in this process, for calls of any number of threads.

Steps run in a thread of their own, which no signal interrupts: whoever waits for results may be interrupted at any
moment (Ctrl-C in a notebook), and what the engine knows stays whole. Calls that are open at a time share batches. The
thread is there while there is work.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.core.engine_core import EngineCore
from engine.core.outputs import RequestOutput
from engine.core.request import Request
from engine.frontend.output_processor import OutputProcessor

POLL_SECONDS = 0.1
"""How often a progress bar is moved."""


@dataclass(slots=True, eq=False)
class Call:
    """The requests of one caller.

    Attributes:
        processors, extend: By request id, what makes text of tokens; and takes what it has made.
        num_tokens, num_finished: So far.
        done: Set once all requests have finished, or none will.
        error: What ended the call.
    """

    requests: list[Request]
    processors: dict[str, OutputProcessor]
    extend: Callable[[RequestOutput], None]
    num_tokens: int = 0
    num_finished: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class StepThread:
    """Runs steps as long as calls are open."""

    def __init__(self, core: EngineCore[Any]) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._arrived: deque[Call] = deque()
        self._cancelled: deque[Call] = deque()
        self._thread: threading.Thread | None = None

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
                if not arrived and not self._core.has_work:
                    self._thread = None
                    return
            try:
                for call in arrived:
                    open_calls |= dict.fromkeys(call.processors, call)
                    for request in call.requests:
                        self._core.add_request(request)
                while self._cancelled:
                    for request_id in self._cancelled.popleft().processors:
                        self._core.abort(request_id)
                        open_calls.pop(request_id, None)
                if self._core.has_work:
                    self._step(open_calls)
            except BaseException as error:
                # Nobody knows how far the step came: what was open ends with it, and the next call finds nothing.
                try:
                    self._core.reset()
                finally:
                    for call in {id(call): call for call in [*open_calls.values(), *arrived]}.values():
                        call.error = error
                        call.done.set()
                    open_calls.clear()

    def _step(self, open_calls: dict[str, Call]) -> None:
        for output in self._core.step():
            call = open_calls.get(output.request_id)
            if call is None:
                continue  # of a call that is no longer waited for
            processor = call.processors[output.request_id]
            addition = processor.process(output)
            for index in processor.stopped_samples:
                self._core.abort(output.request_id, index)
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
