"""Steps: the smallest parts of the check that pass, fail or are skipped by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Status = Literal["passed", "failed", "skipped", "not run"]
Values = dict[str, Any]
"""What a step has to say beside its status, as JSON."""


class Skipped(Exception):
    """A step cannot be run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Step:
    """One check or measurement.

    Attributes:
        group: Steps of a group share a line of the summary.
        run: Returns values; raises AssertionError where the check fails, `Skipped` where it cannot be made.
    """

    group: str
    name: str
    run: Callable[[], Values]


@dataclass(frozen=True, slots=True)
class Result:
    """How a step ended."""

    section: str
    group: str
    name: str
    status: Status
    detail: str = ""
    seconds: float = 0.0
    values: Values = field(default_factory=dict)


def within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> Values:
    """Asserts |actual - expected| <= bound everywhere; returns the largest error as a share of the bound."""
    errors = (actual.double() - expected.double()).abs()
    share = float((errors / bound).max())
    # Written so that a NaN fails.
    assert share <= 1, f"error is {share:.3g} times its bound (at most {float(errors.max()):.3g})"
    return {"error": share}


def equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Asserts equality to the bit."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    different = int((actual != expected.to(actual.device)).sum())
    assert not different, f"{what}: {different} of {actual.numel()} elements differ"


def rounding(dtype: torch.dtype) -> float:
    """The most that rounding a value to `dtype` changes it by, relative to it."""
    return torch.finfo(dtype).eps / 2
