"""The Triton bodies, run by Triton's interpreter on the CPU: a process of its own, since it replaces the compiler.

TRITON_INTERPRET=1 python -m pytest tests/interpreted
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves these tests to a process that interprets."""
    return True if os.environ.get("TRITON_INTERPRET") != "1" else None


class _Numpy:
    """numpy, whose products add along K in one order wherever an element lies in its tile, as a GPU's do.

    Its matmul asks a BLAS, whose kernels for AVX2 treat the elements at a tile's edges otherwise than those within.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.einsum("...mk,...kn->...mn", a, b, dtype=dtype, casting="unsafe")


@pytest.fixture(scope="session", autouse=True)
def products_in_one_order() -> Iterator[None]:
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "np", _Numpy())
        yield
