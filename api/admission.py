"""Which requests are taken in now."""

from __future__ import annotations

from dataclasses import dataclass

from api.errors import ApiError

RETRY_SECONDS = 5
"""When a client may find this server started again, or another in its place."""


@dataclass(slots=True)
class Admission:
    """Whether the server takes requests, besides what its engine says of that.

    Attributes:
        is_draining: Whether it takes no more: those that are open end, and then it does.
    """

    is_draining: bool = False

    def check(self) -> None:
        """
        Raises:
            ApiError: 503, the server is being stopped.
        """
        if self.is_draining:
            # The connection goes, too: the next request may find another server behind the same address.
            headers = {"retry-after": str(RETRY_SECONDS), "connection": "close"}
            raise ApiError(
                503, "the server is being stopped and takes no new requests", code="draining", headers=headers
            )
