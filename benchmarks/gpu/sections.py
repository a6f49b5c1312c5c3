"""Runs sections in processes of their own: several at a time, each up to a deadline, past steps that kill them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import Result

ROOT = Path(__file__).resolve().parent.parent.parent


class Section:
    """One section's process and what it has written.

    Args:
        directory: Takes NAME.jsonl, which the process writes, and NAME.log, its output.
    """

    def __init__(self, name: str, directory: Path, num_threads: int) -> None:
        self.name, self.num_threads = name, num_threads
        stem = name.replace(" ", "-")
        self.path, self.log = directory / f"{stem}.jsonl", directory / f"{stem}.log"
        self.path.write_text("")
        self.log.write_text("")
        self.process: subprocess.Popen[bytes] | None = None
        self.first = 0
        self.deaths: dict[int, str] = {}
        self.is_stopped = False

    def start(self) -> None:
        self.first = self._next()
        self.process = self._launch(self.first)

    def is_done(self) -> bool:
        """Whether the process has ended for good; one that died at a step is started again behind it."""
        assert self.process is not None
        status = self.process.poll()
        if status is None:
            return False
        if status == 0:
            return True
        begun, plan = self._lines("begin"), self._plan()
        if begun and begun[-1] not in self._results():
            self.deaths[begun[-1]] = f"the process ended with status {status}: {self._last_words()}"
        if self._next() == self.first or self._next() >= len(plan):
            return True
        self.start()
        return False

    def stop(self) -> None:
        """Kills the process and those that it has started."""
        self.is_stopped = True
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def results(self) -> list[Result]:
        """One for every planned step."""
        out_of_time = self.is_stopped or self.process is None
        reason = "out of time" if out_of_time else f"its process ended: {self._last_words()}"
        plan, done = self._plan(), self._results()
        if not plan:
            return [Result(self.name, self.name, "start", "not run" if out_of_time else "failed", reason)]
        return [
            done.get(index, Result(self.name, group, name, "not run", reason))
            for index, (group, name) in enumerate(plan)
        ]

    def _launch(self, first: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            # Nothing of this is to reach for the network.
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(self.num_threads),
            "OMP_WAIT_POLICY": "passive",
        }
        command = [sys.executable, "-m", "benchmarks.gpu.worker", self.name, str(self.path), str(first)]
        with self.log.open("a") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,  # a group of its own, to be killed with what it starts
            )

    def _lines(self, kind: str) -> list[Any]:
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut off by the end of its process
            if kind in line:
                lines.append(line[kind])
        return lines

    def _plan(self) -> list[tuple[str, str]]:
        plans = self._lines("plan")
        return [(group, name) for group, name in plans[-1]] if plans else []

    def _results(self) -> dict[int, Result]:
        plan = self._plan()
        died = {
            index: Result(self.name, *plan[index], status="failed", detail=detail)
            for index, detail in self.deaths.items()
        }
        written = {index: Result(**result) for index, result in self._lines("result")}
        return died | written

    def _next(self) -> int:
        return max(self._results(), default=-1) + 1

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def run_sections(
    names: Sequence[str], directory: Path, jobs: int, deadline: float, num_threads: int
) -> list[Result]:
    """Runs sections, `jobs` at a time and in order, until `time.monotonic()` reaches the deadline."""
    sections = [Section(name, directory, num_threads) for name in names]
    waiting, running = list(sections), list[Section]()
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            running = [section for section in running if not section.is_done()]
            time.sleep(0.05)
    finally:
        for section in running:
            section.stop()
    return [result for section in sections for result in section.results()]
