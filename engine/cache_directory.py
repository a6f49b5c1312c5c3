"""Where the engine keeps what it can make again: parsed weights, merges, joined models, compiled kernels."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

VARIABLE = "LLM_ENGINE_CACHE"

_chosen: ContextVar[Path | None] = ContextVar("chosen", default=None)

# A path of a Unix socket may have this many bytes, its end included (unix(7)), less what is put behind a directory.
_SOCKET_PATH_BYTES = 108 - len("/llm-engine-xxxxxxxx/engine-beats") - 1


def cache_directory() -> Path:
    """The directory for files that the engine can make again; not created here.

    `--cache-dir`, or $LLM_ENGINE_CACHE; else llm-engine in $XDG_CACHE_HOME or ~/.cache; for a user without a home, a
    directory of the user's own among the temporary ones.
    """
    chosen = _chosen.get() or os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "llm-engine"
    except RuntimeError:  # there is neither $HOME nor an entry for the user
        return Path(tempfile.gettempdir()) / f"llm-engine-{os.geteuid()}"


@contextmanager
def caching_in(path: str | None) -> Iterator[None]:
    """Has all of it kept in a directory within this context: other threads, and processes, are told themselves.

    Args:
        path: None changes nothing.
    """
    token = _chosen.set(_chosen.get() if path is None else Path(path).absolute())
    try:
        yield
    finally:
        _chosen.reset(token)


def is_private(path: Path) -> bool:
    """Whether this user owns a file or directory, and nobody else can write there: code is loaded from no other."""
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def socket_directory() -> tempfile.TemporaryDirectory[str]:
    """A directory for Unix sockets, which only this user can enter: among the temporary ones, unless that makes
    their paths too long."""
    is_short = len(os.fsencode(tempfile.gettempdir())) <= _SOCKET_PATH_BYTES
    return tempfile.TemporaryDirectory(prefix="llm-engine-", dir=None if is_short else "/tmp")
