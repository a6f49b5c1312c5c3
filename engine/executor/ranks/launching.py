"""Launchers: how the processes of ranks come to be, where they speak with rank 0, and what became of them.

A launcher of this machine's processes is here; one of a cluster's is in `engine.executor.ranks.ray_ranks`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Protocol

import msgspec
import zmq

from engine.cache_directory import socket_directory
from engine.process import exit_cause


class Link(msgspec.Struct, frozen=True):
    """The way to a socket of rank 0.

    Attributes:
        server_key, public_key, secret_key: Of CURVE. The first is public in name only: who does not know it cannot
            even begin to speak, so that only those who were given the link can.
    """

    address: str
    server_key: bytes = b""
    public_key: bytes = b""
    secret_key: bytes = b""

    def connect(self, socket: zmq.Socket[bytes]) -> None:
        if self.server_key:
            socket.curve_serverkey = self.server_key
            socket.curve_publickey, socket.curve_secretkey = self.public_key, self.secret_key
        socket.connect(self.address)


class RankHandle(Protocol):
    """A rank's process, wherever it is.

    Attributes:
        process_id: On this machine; None of one that is elsewhere.
    """

    process_id: int | None

    def poll(self) -> str | None:
        """None while it runs; else what became of it: "was killed by SIGKILL"."""
        ...

    def kill(self) -> None:
        """Ends it now; does not wait for that."""
        ...

    def release(self) -> None:
        """Has it end by itself; does not wait for that."""
        ...

    def end(self, seconds: float) -> None:
        """Waits until it has ended, and ends it if it has not after a while."""
        ...


class Launcher(Protocol):
    """
    Attributes:
        store: Where the groups of all ranks meet, for `engine.parallel.rendezvous.meet`.
    """

    store: str

    def bind(self, socket: zmq.Socket[bytes], name: str) -> Link:
        """Opens a socket of rank 0, named uniquely, and says how ranks reach it."""
        ...

    def start(self, rank: int, orders: Link, reports: Link) -> RankHandle:
        """Starts a rank."""
        ...

    def settle(self) -> None:
        """Takes away what only ranks needed that had not met yet: what is gone cannot be left behind."""
        ...

    def close(self) -> None:
        """Takes away what it made, once all ranks have ended. May be called twice."""
        ...


class ProcessLauncher:
    """Ranks as child processes, in a directory that only this user can enter.

    Args:
        command: What starts one; the addresses of two sockets are added.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self._command = command or (sys.executable, "-m", "engine.executor.ranks.rank_process")
        self._directory = socket_directory()
        self.store = f"{self._directory.name}/store"

    def bind(self, socket: zmq.Socket[bytes], name: str) -> Link:
        link = Link(f"ipc://{self._directory.name}/{name}")
        socket.bind(link.address)
        return link

    def start(self, rank: int, orders: Link, reports: Link) -> RankHandle:
        return _Child(
            subprocess.Popen(
                [*self._command, orders.address, reports.address],
                stdin=subprocess.PIPE,
                process_group=0,
            )
        )

    def settle(self) -> None:
        self._directory.cleanup()

    def close(self) -> None:
        self._directory.cleanup()


class _Child:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.process_id: int | None = process.pid

    def poll(self) -> str | None:
        status = self.process.poll()
        return None if status is None else exit_cause(status)

    def kill(self) -> None:
        self.process.kill()

    def release(self) -> None:
        # It lives as long as this process holds the other end of its standard input.
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def end(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
