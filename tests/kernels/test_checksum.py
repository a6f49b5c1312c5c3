"""The checksum in C against the one in numpy, and what it sees."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import checksum as module
from engine.kernels import cpu
from engine.kernels.checksum import LANES, ROWS, checksum

BLOCK = 4 * LANES * ROWS
SIZES = [0, 1, 4, 4 * LANES - 1, 4 * LANES, 4 * LANES + 1, BLOCK, BLOCK + 5, 2 * BLOCK + 4 * LANES]


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@pytest.mark.skipif(cpu.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("size", SIZES)
def test_c_has_the_numbers_of_numpy(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_bytes(size)
    in_c = checksum(data)
    monkeypatch.setattr(module.cpu, "library", lambda: None)
    assert checksum(data) == in_c


def test_changes_are_seen() -> None:
    data = random_bytes(BLOCK + 4 * LANES + 3)
    before = checksum(data)
    for place in (0, 4 * LANES - 1, BLOCK - 1, BLOCK, len(data) - 1):
        for bit in (1, 128):
            changed = data.clone()
            changed[place] ^= bit
            assert checksum(changed) != before
    assert checksum(data[:-1]) != before
    assert checksum(torch.cat([data, torch.zeros(1, dtype=torch.uint8)])) != before
    swapped = torch.cat([data[4:8], data[:4], data[8:]])
    assert checksum(swapped) != before
    blocks = torch.cat([data[4 * LANES : 8 * LANES], data[: 4 * LANES], data[8 * LANES :]])
    assert checksum(blocks) != before


def test_the_type_does_not_matter() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert checksum(tensor) == checksum(tensor.view(torch.uint8))
    assert checksum(tensor.t().contiguous()) != checksum(tensor)
