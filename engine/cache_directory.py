"""Where the engine keeps what it can make again: parsed weights, joined models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The user's directory for files that the engine can make again; not created here."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llm-engine"
