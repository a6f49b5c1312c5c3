"""Rank 0 on one host, others on another: `python -m tests.helpers.two_hosts …`, in namespaces of its own.

    … logits MODEL OUT      what `run_chunks` returns of two ranks that share the layers, until the link is cut
    … mp ADDRESS BEATS      an engine process, which starts the other ranks itself
    … ray ADDRESS BEATS     one that finds a cluster of both hosts

All end with this process, and it with its standard input.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import zmq

from engine.config import EngineConfig
from engine.errors import RankFailedError
from engine.executor.ranks.launching import Link, ProcessLauncher
from engine.executor.ranks.ranks import launch
from engine.frontend import engine_process
from engine.loading.checkpoint import open_checkpoint
from engine.parallel.rendezvous import address_of, host_store
from engine.process import follow_parent
from tests.helpers.delayed_link import DELAY_SECONDS, FAR, NEAR, connect, num_bytes_sent, round_trip
from tests.helpers.paged import make_sequences, run_chunks


class FarLauncher(ProcessLauncher):
    """Ranks that are processes of the other host.

    Args:
        far: As `connect` returns it.
    """

    def __init__(self, far: tuple[str, ...]) -> None:
        super().__init__((*far, sys.executable, "-m", "engine.executor.ranks.rank_process"))
        self._store = host_store(NEAR)
        self.store = address_of(self._store)

    def bind(self, socket: zmq.Socket[bytes], name: str) -> Link:
        return Link(f"tcp://{NEAR}:{socket.bind_to_random_port(f'tcp://{NEAR}')}")


def start_cluster(far: tuple[str, ...]) -> None:
    """Starts Ray on both hosts."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # on by default where this user has ever run Ray otherwise
    directory = f"--temp-dir={tempfile.gettempdir()}/ray"
    size = ("--num-cpus=1", f"--object-store-memory={100 << 20}")
    start = (sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", directory, *size)
    os.environ["RAY_ADDRESS"] = address = f"{NEAR}:6379"
    subprocess.run((*start, "--head", "--port=6379", f"--node-ip-address={NEAR}"), check=True)
    subprocess.run((*far, *start, f"--address={address}", f"--node-ip-address={FAR}"), check=True)


def save_logits(far: tuple[str, ...], model: str, out: str) -> int:
    path = Path(model)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_memory": "4MiB"}
    config = EngineConfig(model=model, quant="int8", num_threads=1, tensor_parallel_size=2, **options)
    runner, steps, ranks = launch(config, open_checkpoint(path), path, launcher=FarLauncher(far))
    together: Any = SimpleNamespace(cache=runner.cache, plan=runner.plan, execute=steps.execute)
    before = num_bytes_sent()
    sequences = make_sequences(runner.model_config.vocab_size)
    torch.save(run_chunks(together, sequences), out)
    assert num_bytes_sent() - before >= runner.place.group.num_bytes["gather"] > 0
    threading.Timer(0.2, cut_link).start()

    def run_forever() -> None:
        for admission in count(1):
            run_chunks(together, sequences, admission=admission)

    # Nobody ends this process, which waits for a host that it will not hear of again.
    with pytest.raises(RankFailedError, match=r"^rank 1 has been silent for 5 s at step "):
        run_forever()
    ranks.close()
    return 0


def cut_link() -> None:
    subprocess.run(("ip", "link", "set", "near", "down"), check=True)


def main(what: str, *arguments: str) -> int:
    follow_parent()
    far = connect()
    # There is no shorter way.
    assert min(round_trip() for _ in range(10)) >= 2 * DELAY_SECONDS
    if what == "logits":
        return save_logits(far, *arguments)
    if what == "ray":
        start_cluster(far)
    address, beats = arguments
    with patch("engine.executor.ranks.ranks.ProcessLauncher", lambda: FarLauncher(far)):
        return engine_process.main(address, beats)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
