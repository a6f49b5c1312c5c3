"""What every endpoint works with: the engine, its metrics and the names it is served under."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from typing import TYPE_CHECKING

from api.admission import Admission
from api.body import Bodies
from api.errors import ApiError, engine_dead, retry_later
from api.metrics import Metrics
from api.unknown_members import UnknownMembers

if TYPE_CHECKING:
    from engine.frontend.async_engine import ServedEngine

VERSION = version("llm-engine")
"""The server's."""


@dataclass(frozen=True, slots=True)
class Service:
    """The engine as the endpoints see it.

    Attributes:
        admission: Which requests are taken in now.
        served_model_names: Names a request may give as `model`; answers carry the one it gave.
        takes_any_name: Whether it may give any other, too.
        created: When the server started, in seconds since 1970.
        max_body_bytes: As `Bodies` takes it.
        unknown_members: What requests hold that nothing reads.
        bodies: Those of requests that are being read.
    """

    engine: ServedEngine
    metrics: Metrics
    admission: Admission
    served_model_names: list[str]
    takes_any_name: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    max_body_bytes: int | None = None
    unknown_members: UnknownMembers = field(init=False)
    bodies: Bodies = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bodies", Bodies(self.engine, self.max_body_bytes))
        object.__setattr__(self, "unknown_members", UnknownMembers(self.metrics))

    @property
    def fingerprint(self) -> str:
        """What stands in answers for all that they depend on besides the request."""
        return _fingerprint(self.engine.identity)

    def check_ready(self) -> None:
        """Raises ApiError 503 with the cause unless requests are taken in.

        An engine that is started again in the place of another takes them: they wait for it.
        """
        self.admission.check()
        self.check_alive()

    def check_alive(self) -> None:
        """Raises ApiError 503 with the cause unless the engine lives, or another is started in its place."""
        match self.engine.status:
            case "starting":
                raise retry_later(503, "the model is still loading", "starting", 2)
            case "dead":
                raise engine_dead()

    def check_model(self, name: str | None) -> str:
        """The name to answer under.

        Raises:
            ApiError: 404, no model of this name is served.
        """
        if name is None:
            return self.served_model_names[0]
        if name not in self.served_model_names and not self.takes_any_name:
            served = ", ".join(self.served_model_names)
            raise ApiError(
                404, f"model {name!r} does not exist; served: {served}", param="model", code="model_not_found"
            )
        return name


@cache
def _fingerprint(identity: str) -> str:
    return "fp_" + blake2b(f"{identity}/{VERSION}".encode(), digest_size=5).hexdigest()
