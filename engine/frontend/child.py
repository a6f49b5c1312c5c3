"""The engine's process as its parent holds it, which starts it first: torch loads while the parent loads the rest."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.asyncio

from engine.cache_directory import socket_directory
from engine.frontend.progress_page import ProgressPage

SHUTDOWN_SECONDS = 5.0

OPENMP_SPINS = "20000"
"""How often torch's threads look for work before they sleep, tens of microseconds. By default they spin for
milliseconds, and take the core from whoever they wait for when the machine has something else to do."""


@dataclass(frozen=True, slots=True)
class EngineChild:
    """A process that waits to be told what to be.

    Attributes:
        exited: Its exit status.
        socket: Messages, both ways.
        beats: Signs of life.
        page: What it says that it is at.
        directory: Of the sockets; only this user can enter it.
    """

    process: asyncio.subprocess.Process
    exited: asyncio.Task[int]
    socket: zmq.asyncio.Socket
    beats: zmq.asyncio.Socket
    context: zmq.asyncio.Context
    page: ProgressPage
    directory: tempfile.TemporaryDirectory[str]

    async def end(self) -> None:
        """Ends the process and lets go of sockets and memory. May be called twice."""
        await end_process(self.process)
        self.page.close()
        self.context.destroy(linger=0)
        self.directory.cleanup()


async def launch(command: Sequence[str] | None = None) -> EngineChild:
    """Starts an engine's process, which takes seconds to load its libraries.

    Args:
        command: What starts it; two addresses are added.
    """
    directory = socket_directory()
    address = f"ipc://{directory.name}/engine"
    page = ProgressPage(Path(directory.name) / "engine-page", creates=True)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.bind(address)
    beats = context.socket(zmq.PULL)
    beats.bind(f"{address}-beats")
    try:
        process = await asyncio.create_subprocess_exec(
            *(command or (sys.executable, "-m", "engine.frontend.engine_process")),
            address,
            f"{address}-beats",
            stdin=asyncio.subprocess.PIPE,
            # Signals to this process's group are this process's to handle. Not a session: where those share the CPUs
            # (sched(7), autogroup), a niceness given to the server would not act on its engine. uvloop has no
            # process_group.
            preexec_fn=os.setpgrp,
            env={"GOMP_SPINCOUNT": OPENMP_SPINS, **os.environ},
        )
    except BaseException:
        context.destroy(linger=0)
        directory.cleanup()
        raise
    return EngineChild(process, asyncio.create_task(process.wait()), socket, beats, context, page, directory)


async def end_process(process: asyncio.subprocess.Process) -> None:
    """Closes the process's standard input, its sign to go, and insists if it does not."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
