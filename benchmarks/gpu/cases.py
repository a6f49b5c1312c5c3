"""Work that a kernel and libraries do alike, and timing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.gpu.steps import Values
from benchmarks.gpu.timing import Call, Timer

Unit = Literal["bf16", "int8"]


@dataclass(frozen=True, slots=True)
class Case:
    """Work of one size, done by our kernel and by others.

    Attributes:
        size: The number of tokens or sequences; a column of the table.
        num_bytes: That must be read and written.
        operations: Multiplications and additions of matrix products, of the type that `unit` names.
        calls: By name; "ours" first. Each makes calls that do the same work, enough to fill the cache.
    """

    size: int
    num_bytes: int
    operations: int
    calls: Mapping[str, Callable[[], Sequence[Call]]]
    unit: Unit = "bf16"


def measure(cases: Sequence[Case], timer: Timer) -> Values:
    """Times every call of every case; one that a machine cannot make is left out, with the reason."""
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for case in cases:
        row: dict[str, Any] = {
            "size": case.size,
            "bytes": case.num_bytes,
            "operations": case.operations,
            "unit": case.unit,
        }
        for name, make in case.calls.items():
            try:
                row[name] = timer(make())
            except Exception as error:
                if name == "ours" or isinstance(error, torch.AcceleratorError):
                    raise
                skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        rows.append(row)
    return {"rows": rows, "left out": skipped}


def products(
    call: Callable[..., Any], weights: Sequence[Any], inputs: Sequence[Any]
) -> Callable[[], Sequence[Call]]:
    """Calls of each weight in turn with the inputs in turn."""
    return lambda: [partial(call, weight, inputs[i % len(inputs)]) for i, weight in enumerate(weights)]
