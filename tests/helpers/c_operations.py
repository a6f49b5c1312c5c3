"""A library of C kernels with operations of a test's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.kernels import cpu

SHARED = ("kernels.h", "operations.c", "pool.c", "exchange.c")
"""What such a library has from the engine: all but the list of operations and their bodies."""


def write_sources(directory: Path, signatures: str, bodies: str) -> tuple[list[Path], list[Path]]:
    """Writes a library's sources.

    Args:
        signatures: The list of operations, in place of operations.h.
        bodies: C that defines them.

    Returns:
        Sources and headers, in place of `cpu.SOURCES` and `cpu.HEADERS`.
    """
    for file in cpu.SOURCES + cpu.HEADERS:
        if file.name in SHARED:
            shutil.copy(file, directory)
    (directory / "operations.h").write_text(signatures)
    text = f'#include "kernels.h"\n\nint enable_tiles(void) {{ return 0; }}\n\n{bodies}'
    (directory / "bodies.c").write_text(text)
    return sorted(directory.glob("*.c")), sorted(directory.glob("*.h"))
