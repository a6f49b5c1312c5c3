"""What every endpoint works with: the engine, its metrics and the names it is served under."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from api.errors import ApiError
from api.metrics import Metrics
from api.unknown_members import UnknownMembers

if TYPE_CHECKING:
    from engine.frontend.async_engine import ServedEngine


@dataclass(frozen=True, slots=True)
class Service:
    """The engine as the endpoints see it.

    Attributes:
        served_model_names: Names a request may give as `model`; answers carry the one it gave.
        created: When the server started, in seconds since 1970.
        unknown_members: What requests hold that nothing reads.
    """

    engine: ServedEngine
    metrics: Metrics
    served_model_names: list[str]
    created: int = field(default_factory=lambda: int(time.time()))
    unknown_members: UnknownMembers = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unknown_members", UnknownMembers(self.metrics))

    def check_ready(self) -> None:
        """Raises ApiError 503 with the cause unless the engine takes requests.

        One that is started again in the place of another takes them: they wait for it.
        """
        match self.engine.status:
            case "starting":
                raise ApiError(
                    503,
                    "the model is still loading; try again shortly",
                    code="starting",
                    headers={"retry-after": "2"},
                )
            case "dead":
                raise ApiError(503, self.engine.error or "the engine has ended", code="engine_dead")

    def check_model(self, name: str | None) -> str:
        """The name to answer under.

        Raises:
            ApiError: 404, no model of this name is served.
        """
        if name is None:
            return self.served_model_names[0]
        if name not in self.served_model_names:
            served = ", ".join(self.served_model_names)
            raise ApiError(
                404, f"model {name!r} does not exist; served: {served}", param="model", code="model_not_found"
            )
        return name
