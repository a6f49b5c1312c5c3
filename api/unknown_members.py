"""Members of a request that nothing here reads: counted, and logged once by name.

For endpoints whose clients add members monthly, and would break if these were refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from api.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_LOGGED = 256
"""Names that are logged at most: clients make them up."""

MAX_NAME = 128
"""Characters of a name that are logged."""


class UnknownMembers:
    """Counts them for all requests of a server."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._logged: set[tuple[str, str]] = set()

    def note(self, endpoint: str, names: Iterable[str]) -> None:
        """Counts and logs what a request to an endpoint holds; `names` are paths, as `find_unknown` has them."""
        for name in names:
            self._metrics.count_unknown_member(endpoint)
            key = (endpoint, name[:MAX_NAME])
            if key not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add(key)
                logger.warning("%s: nothing here reads %s; it is accepted without effect", *key)


def find_unknown(value: Any, kind: Any, path: str = "") -> Iterator[str]:
    """Paths such as messages[].content[].trace of members that no field of a struct takes.

    Args:
        value: What fits `kind`: JSON as dictionaries, lists and scalars.
        kind: A struct, or a type made of structs, lists, dictionaries and unions. A union holds one struct at most.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is list:
        for item in value if isinstance(value, list) else ():
            yield from find_unknown(item, parts[0], f"{path}[]")
    elif origin is dict:
        for item in value.values() if isinstance(value, dict) else ():
            yield from find_unknown(item, parts[1], f"{path}{{}}")
    elif parts:  # a union, or a type with a note
        for part in parts:
            yield from find_unknown(value, part, path)
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
        fields = _fields(kind)
        for name, member in value.items():
            where = f"{path}.{name}" if path else name
            if name in fields:
                yield from find_unknown(member, fields[name], where)
            else:
                yield where


@cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Types by the names that JSON has for the fields."""
    hints = get_type_hints(kind)
    return {field.encode_name: hints[field.name] for field in msgspec.structs.fields(kind)}
