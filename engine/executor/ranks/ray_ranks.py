"""Ranks as Ray actors, on the nodes of a cluster that `ray start` has joined (`--distributed-executor-backend ray`).

    rank 0, the engine's own process ── orders, reports: zmq over TCP, CURVE ──▶ actors: the loop of `rank_process`
                                     ◀── tensors: gloo or NCCL ──▶

Ray finds the nodes, starts the actors and carries the keys; what a step needs goes past it. The ranks of a stage
share its layers and exchange several tensors in each: they are put on one node where one is large enough, else side
by side. On GPUs no machine has run this yet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import ray
import zmq
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.errors import ConfigError
from engine.executor.ranks.launching import Link
from engine.parallel.rendezvous import address_of, host_store

logger = logging.getLogger(__name__)

PLACEMENT_SECONDS = 60.0
"""How long a cluster may take to find room; one that scales itself adds nodes meanwhile."""

REACH_SECONDS = 10.0
"""How long the host that a cluster was started on may take to answer."""

INHERITED = ("GOMP_SPINCOUNT", "LLM_ENGINE_CACHE", "OMP_WAIT_POLICY", "XDG_CACHE_HOME")
"""Variables of this process that ranks have, too."""


class RayLauncher:
    """See `engine.executor.ranks.launching.Launcher`.

    Args:
        size: Number of ranks.
        stage_size: Of a stage: ranks n * stage_size … share their layers.
        device: "cuda" takes a GPU a rank.

    Raises:
        ConfigError: There is no cluster, or no room in it.
    """

    def __init__(self, size: int, stage_size: int, device: str) -> None:
        self._joined = not ray.is_initialized()
        if self._joined:
            _join_cluster()
        self._needs = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
        self._node = ray.get_runtime_context().get_node_id()
        self._group: PlacementGroup | None = None
        self._killers: dict[int, Any] = {}
        try:
            self._group, self._ranks_per_bundle = self._take_room(size, stage_size)
            if device == "cuda":
                self._take_gpu()
        except BaseException:
            self.close()
            raise
        self._host = ray.util.get_node_ip_address()
        self._store = host_store(self._host)
        self.store = address_of(self._store)
        self._server_key, self._server_secret = zmq.curve_keypair()
        self._client_key, self._client_secret = zmq.curve_keypair()

    def bind(self, socket: zmq.Socket[bytes], name: str) -> Link:
        socket.curve_server = True
        socket.curve_secretkey, socket.curve_publickey = self._server_secret, self._server_key
        port = socket.bind_to_random_port(f"tcp://{self._host}")
        return Link(f"tcp://{self._host}:{port}", self._server_key, self._client_key, self._client_secret)

    def start(self, rank: int, orders: Link, reports: Link) -> _Actor:
        actor = (
            ray.remote(RankActor)
            .options(
                num_cpus=1,
                num_gpus=self._needs.get("GPU", 0),
                scheduling_strategy=self._seat(rank),
                runtime_env={
                    "env_vars": {name: os.environ[name] for name in INHERITED if name in os.environ}
                },
            )
            .remote()
        )
        bundle = rank // self._ranks_per_bundle
        if bundle not in self._killers:
            killer = ray.remote(Killer).options(num_cpus=0, scheduling_strategy=self._seat(rank))
            self._killers[bundle] = killer.remote()
        return _Actor(actor, self._killers[bundle], orders, reports)

    def settle(self) -> None:
        pass

    def close(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._joined:
            self._joined = False
            ray.shutdown()

    def _take_room(self, size: int, stage_size: int) -> tuple[PlacementGroup, int]:
        """A placement group for all ranks, rank 0's place in it on this node; and how many ranks a bundle holds."""
        needed = {name: number * stage_size for name, number in self._needs.items()}
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        num_large = sum(_holds(resources, needed) for resources in nodes.values())
        is_large = _holds(nodes[self._node], needed) and num_large * stage_size >= size
        ranks_per_bundle = stage_size if is_large else 1
        if not is_large and stage_size > 1:
            logger.warning(
                "no node for the %d ranks of each stage has %s: they exchange over the network in every layer",
                stage_size,
                _listed(needed),
            )
        bundle = {name: number * ranks_per_bundle for name, number in self._needs.items()}
        num_bundles = size // ranks_per_bundle
        here = {"ray.io/node-id": self._node}
        group = placement_group(
            [bundle] * num_bundles,
            strategy="PACK",
            bundle_label_selector=[here] + [{}] * (num_bundles - 1),
        )
        if not group.wait(PLACEMENT_SECONDS):
            remove_placement_group(group)
            raise ConfigError(
                f"distributed_executor_backend: {size} ranks need {_listed(self._needs)} each, one of them on this "
                f"node, and the cluster has {_listed(ray.available_resources())} free: add nodes with ray start"
            )
        return group, ranks_per_bundle

    def _seat(self, rank: int) -> PlacementGroupSchedulingStrategy:
        assert self._group is not None
        return PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=rank // self._ranks_per_bundle
        )

    def _take_gpu(self) -> None:
        """Has Ray keep for rank 0, this process, the GPU that it uses: the first that it sees.

        Raises:
            ConfigError: Ray has another one left.
        """
        self._keeper = (
            ray.remote(GpuKeeper).options(num_cpus=0, num_gpus=1, scheduling_strategy=self._seat(0)).remote()
        )
        given = ray.get(self._keeper.gpu.remote())
        if given != os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]:
            raise ConfigError(
                f"distributed_executor_backend: of this node Ray gives GPU {given}; set CUDA_VISIBLE_DEVICES={given}"
            )


class RankActor:
    """A rank in an actor's process."""

    def process(self) -> int:
        return os.getpid()

    def follow(self, orders: Link, reports: Link) -> None:
        from engine.executor.ranks.rank_process import follow

        follow(orders, reports)


class Killer:
    """Ends processes of its node."""

    def kill(self, process: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


class GpuKeeper:
    """Holds a GPU that another process uses."""

    def gpu(self) -> str:
        return str(ray.get_gpu_ids()[0])


class _Actor:
    """See `engine.executor.ranks.launching.RankHandle`."""

    process_id: int | None = None

    def __init__(self, actor: Any, killer: Any, orders: Link, reports: Link) -> None:
        self._actor, self._killer = actor, killer
        self._process = actor.process.remote()
        self._end = actor.follow.remote(orders, reports)

    def poll(self) -> str | None:
        if not ray.wait([self._end], timeout=0)[0]:
            return None
        try:
            ray.get(self._end)
        except RayActorError as error:
            return f"has lost its actor: {_one_line(error)}"
        except RayError as error:
            return f"has failed: {_one_line(error)}"
        return "has ended"

    def kill(self) -> None:
        # Ray asks a process to end before it insists: one that hangs would keep the others waiting.
        self._killer.kill.remote(self._process)
        ray.kill(self._actor)

    def release(self) -> None:
        # It has nothing to finish: for what it was told to do nobody waits any more.
        self.kill()

    def end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)


def _join_cluster() -> None:
    """
    Raises:
        ConfigError: There is none.
    """
    address = None
    try:
        address = canonicalize_bootstrap_address("auto")
        if address is not None:
            # Where $RAY_ADDRESS or a file says that a cluster is, though it is no more, Ray would wait for minutes.
            url = urlsplit(f"tcp://{address}")
            socket.create_connection((url.hostname, url.port), REACH_SECONDS).close()
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:
        raise ConfigError(
            f"distributed_executor_backend: ray finds no cluster{f' at {address}' if address else ''}; run "
            "ray start --head on this machine, and ray start --address=… on the others"
        ) from error


def _holds(resources: dict[str, float], needed: dict[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= number for name, number in needed.items())


def _listed(resources: dict[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name in resources)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
