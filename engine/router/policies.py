"""What Ray Serve decides by: where a request goes, and how many replicas there are.

Ray Serve copies the classes of this module into its own processes, by value: what they know of ours is imported.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from engine.router.affinity import PrefixAffinity, Resumable

QUEUED_TOKENS = "queued_tokens"
"""The metric of a replica: tokens that its open requests are still to compute."""


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Sends a request to the replica that has its prefix, by `PrefixAffinity`."""

    def initialize_state(self, block_size: int) -> None:
        self._affinity = PrefixAffinity(block_size)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._affinity.keep({replica.replica_id.unique_id for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates, each a rank of its own.

        None while there are only such as have died under the request, their ends not yet known to Ray Serve: it asks
        again, after growing pauses, until it has replaced them.
        """
        request = _request_of(pending_request)
        if pending_request is None or request is None:
            return [candidate_replicas]
        # Without, the next attempt would follow at once.
        pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in self._affinity.order(request, by_name)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request = _request_of(pending_request)
        if request is not None:
            key = pending_request.metadata.internal_request_id
            self._affinity.send(request, replica_id.unique_id, key)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._affinity.end(replica_id.unique_id, internal_request_id)


class QueuedTokensPolicy:
    """As many replicas as keep the tokens that wait at each below a target.

    Bounds and delays are Ray Serve's.
    """

    def __init__(self, target_queued_tokens: float) -> None:
        self._target = target_queued_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        measured = (context.aggregated_metrics or {}).get(QUEUED_TOKENS, {})
        return sum(measured.values()) / self._target, {}


def _request_of(pending_request: PendingRequest | None) -> Resumable | None:
    if pending_request is None or not pending_request.args:
        return None
    request = pending_request.args[0]
    return request if isinstance(request, Resumable) else None
