"""The Triton bodies, run by Triton's interpreter on the CPU: a process of its own, since it replaces the compiler.

TRITON_INTERPRET=1 python -m pytest tests/interpreted
"""

from __future__ import annotations

import os
from pathlib import Path


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves these tests to a process that interprets."""
    return True if os.environ.get("TRITON_INTERPRET") != "1" else None
