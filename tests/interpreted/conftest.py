"""The Triton bodies, run by Triton's interpreter on the CPU: a process of its own, since it replaces the compiler.

TRITON_INTERPRET=1 python -m pytest tests/interpreted
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves these tests to a process that interprets."""
    return True if os.environ.get("TRITON_INTERPRET") != "1" else None


def _matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Adds along K in one order wherever an element lies in its tile, as a GPU does.

    numpy's own asks a BLAS, whose kernels for AVX2 treat the elements at a tile's edges otherwise than those within.
    """
    return np.einsum("...mk,...kn->...mn", a, b, dtype=dtype, casting="unsafe")


@pytest.fixture(scope="session", autouse=True)
def products_in_one_order() -> Iterator[None]:
    from triton.runtime import interpreter

    numpy = ModuleType("numpy")
    numpy.__dict__.update(vars(np), matmul=_matmul)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "np", numpy)
        yield


@pytest.fixture(scope="session", autouse=True)
def prepared_once() -> Iterator[None]:
    """Has the interpreter do once what it does anew in each call of a device function, and for each tensor: it
    replaces functions of triton.language, and makes a table of types. That is four tenths of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    replaced: set[tuple[bool, bool]] = set()
    types: dict[str, np.dtype] = {}

    def replace_once(function: Any) -> Any:
        # In which modules depends on those that the function sees.
        seen = function.__globals__.values()
        modules = any(value is tl for value in seen), any(value is tl.core for value in seen)
        if modules not in replaced:
            replaced.add(modules)
            replace(function)
        return SimpleNamespace(restore=lambda: None)

    def np_dtype_once(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in types:
            types[name] = np_dtype(dtype)
        return types[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter, "_get_np_dtype", np_dtype_once)
        yield
