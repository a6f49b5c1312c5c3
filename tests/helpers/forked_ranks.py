"""Ranks that are forked from a process which has imported all of it: they start in a tenth of a second, not in three.

What a rank does is that of `ProcessLauncher`, whose sockets and arguments it gets; only how it comes to be differs.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from engine.executor.ranks import rank_process
from engine.executor.ranks.launching import Link, ProcessLauncher, RankHandle
from engine.process import exit_cause

CONTEXT = get_context("forkserver")


def start_server() -> None:
    """Starts the process that others are forked from, if it does not run: one of this session, as its child."""
    CONTEXT.set_forkserver_preload(["engine.executor.ranks.rank_process", "tests.helpers.forked_ranks"])
    forkserver.ensure_running()


class ForkLauncher(ProcessLauncher):
    """See `engine.executor.ranks.launching.Launcher`.

    Args:
        script: A program that a rank runs instead of the engine's.
    """

    def __init__(self, script: Path | None = None) -> None:
        super().__init__()
        self._script = script

    def start(self, rank: int, orders: Link, reports: Link) -> RankHandle:
        stdin, end = CONTEXT.Pipe(duplex=False)
        with stdin, Connection(os.dup(2), readable=False) as stderr:
            arguments = (self._script, [orders.address, reports.address], stdin, stderr, dict(os.environ))
            process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
            process.start()
        return _Fork(process, end)


class _Fork:
    def __init__(self, process: ForkServerProcess, end: Connection) -> None:
        self.process, self._end = process, end
        self.process_id: int | None = process.pid

    def poll(self) -> str | None:
        status = self.process.exitcode
        return None if status is None else exit_cause(status)

    def kill(self) -> None:
        self.process.kill()

    def release(self) -> None:
        self._end.close()

    def end(self, seconds: float) -> None:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _run(
    script: Path | None,
    arguments: list[str],
    stdin: Connection,
    stderr: Connection,
    environment: dict[str, str],
) -> None:
    os.setsid()
    os.dup2(stdin.fileno(), 0)
    os.dup2(stderr.fileno(), 2)
    stdin.close()
    stderr.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (it stays)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    if script is None:
        sys.exit(rank_process.main(*arguments))
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
