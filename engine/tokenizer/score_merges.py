"""The merges that make BPE choose as SentencePiece does, kept from an earlier start: finding them takes seconds.

SentencePiece joins the neighbours whose joint piece has the highest score. So every way to split a piece in two
pieces is a merge, and merges are ranked by the score of what they make.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.cache_directory import cache_directory

logger = logging.getLogger(__name__)

Pairs = npt.NDArray[np.int32]
"""[merges, 2]: the ids of the left and the right piece."""

_FORMAT = b"merges 1"
"""Part of what files are named by; goes up when other merges are found."""

_DIGEST_BYTES = 32


def merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], pieces: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges of a vocabulary, the first that applies first.

    A file in the cache directory has them from the second time on. What it is named by is all that they depend on;
    one that is damaged is made anew.

    Args:
        pieces: Ids of the tokens that text is made of.
    """
    path = cache_directory() / "vocabularies" / f"{_key(tokens, scores, pieces)}.merges"
    pairs = _read(path)
    if pairs is None:
        pairs = _find(tokens, scores, pieces)
        _save(pairs, path)
    left, right = (map(tokens.__getitem__, ids.tolist()) for ids in pairs.T)
    return list(zip(left, right, strict=True))


def _find(tokens: Sequence[str], scores: Sequence[float], pieces: Sequence[int]) -> Pairs:
    ordered = sorted(pieces, key=lambda index: -scores[index])
    ids = {tokens[index]: index for index in ordered}
    found = array(
        "i",
        (
            index
            for piece in (tokens[index] for index in ordered)
            for cut in range(1, len(piece))
            if (left := ids.get(piece[:cut])) is not None and (right := ids.get(piece[cut:])) is not None
            for index in (left, right)
        ),
    )
    return np.array(found, np.int32).reshape(-1, 2)


def _key(tokens: Sequence[str], scores: Sequence[float], pieces: Sequence[int]) -> str:
    digest = hashlib.blake2b(_FORMAT, digest_size=16)
    # No token of a file holds half of a surrogate pair: what is joined with one can be taken apart in one way.
    digest.update("\ud800".join(tokens).encode("utf-8", "surrogatepass"))
    digest.update(array("d", scores))
    digest.update(array("q", pieces))
    return digest.hexdigest()


def _read(path: Path) -> Pairs | None:
    """What an earlier start left there, if it is what was written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s: cannot be read (%s): the merges are found again", path, error)
        return None
    digest, pairs = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if digest != _digest(pairs):
        logger.warning("%s: damaged: the merges are found again", path)
        return None
    return np.frombuffer(pairs, np.int32).reshape(-1, 2)


def _save(pairs: Pairs, path: Path) -> None:
    """Writes beside the target and renames: another process sees the whole file or none."""
    data, temporary = pairs.tobytes(), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(_digest(data) + data)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("merges cannot be kept in %s (%s), and are found at each start", path.parent, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
