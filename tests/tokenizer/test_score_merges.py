"""Merges found from scores, and the file that keeps them: whatever becomes of it, they are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.cache_directory import caching_in
from engine.tokenizer import score_merges
from engine.tokenizer.score_merges import merges_by_score

TOKENS = ["<s>", "a", "b", "ab", "aab", "ba", "aaba", "ab ", " ", "é", "éa"]
SCORES = [0.0, -10, -11, -1, -2, -3, -4, -5, -12, -13, -6]
PIECES = list(range(1, len(TOKENS)))
MERGES = [("a", "b"), ("a", "ab"), ("b", "a"), ("aab", "a"), ("ab", " "), ("é", "a")]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def find(cache: Path, tokens: list[str] = TOKENS, scores: list[float] = SCORES) -> list[tuple[str, str]]:
    with caching_in(str(cache)):
        return merges_by_score(tokens, scores, PIECES)


def files(cache: Path) -> list[Path]:
    return sorted((cache / "vocabularies").iterdir())


def test_every_split_in_pieces_by_the_score_of_the_whole(cache: Path) -> None:
    assert find(cache) == MERGES
    scores = SCORES.copy()
    scores[3], scores[10] = scores[10], scores[3]
    assert find(cache, scores=scores) == [MERGES[5], *MERGES[1:5], MERGES[0]]


def test_a_second_start_reads_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find(cache)

    def refuse(*_: object) -> None:
        raise AssertionError("found again")

    monkeypatch.setattr(score_merges, "_find", refuse)
    assert find(cache) == MERGES


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + bytes(8)),
    "checksum": lambda file: flip(file, 0),
    "a merge": lambda file: flip(file, -4),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_made_anew(damage: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    find(cache)
    (file,) = files(cache)
    good = file.read_bytes()
    DAMAGES[damage](file)
    assert find(cache) == MERGES
    assert str(file) in caplog.text
    assert file.read_bytes() == good
    assert files(cache) == [file]


def test_another_vocabulary_has_another_file(cache: Path) -> None:
    find(cache)
    assert find(cache, [*TOKENS[:-1], "éb"]) == [*MERGES[:5], ("é", "b")]
    # The same characters in a row, cut elsewhere.
    with caching_in(str(cache)):
        assert merges_by_score(["x", "yx", "y"], [0, 0, 0], [0, 1, 2]) == [("y", "x")]
        assert merges_by_score(["xy", "x", "y"], [0, 0, 0], [0, 1, 2]) == [("x", "y")]
        assert merges_by_score(["xy", "x", "y"], [0, 0, 0], [1, 2]) == []
    assert len(files(cache)) == 5


def test_a_cache_that_cannot_be_written_costs_time_only(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir()
    (cache / "vocabularies").write_text("a file")
    assert find(cache) == MERGES
    assert str(cache / "vocabularies") in caplog.text
