"""The router that prefix affinity is compared with."""

from __future__ import annotations

from itertools import count

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class RoundRobinRouter(RequestRouter):
    """Each request to the next replica, in the order of their names."""

    def initialize_state(self, block_size: int) -> None:
        self._turns = count()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        replicas = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        return [[replicas[next(self._turns) % len(replicas)]]]
